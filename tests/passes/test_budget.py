"""Budgets are exact arithmetic: the counts of the published tables, on ints and on tensors alike."""

from __future__ import annotations

from collections.abc import Sequence
from fractions import Fraction
from itertools import pairwise
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from tokcc.config import Budget, load_policy
from tokcc.ir.builder import EagerBuilder
from tokcc.passes.budget import Count, resolve_budget
from tokcc.passes.methods import library

B = EagerBuilder()


def counts(preset: str, depth: int = 12, **params: Any) -> tuple[tuple[int, ...], list[Count]]:
    (step,) = load_policy({"version": 1, "steps": [{"preset": preset, **params}]}, presets=library()).policy.steps
    layers = step.at.resolve(depth)
    return layers, resolve_budget(step.budget, layers, depth)


def merged(preset: str, tokens: int = 197, depth: int = 12, **params: Any) -> list[int]:
    """Tokens after each layer of a merging preset with one class token: at most half of the candidates merge."""
    by_layer = dict(zip(*counts(preset, depth, **params), strict=True))
    lengths = []
    for layer in range(depth):
        if layer in by_layer:
            n = tokens - 1
            tokens -= min(n - by_layer[layer].kept(B, n, 196), n // 2)
        lengths.append(tokens)
    return lengths


TOME = {
    8: [189, 181, 173, 165, 157, 149, 141, 133, 125, 117, 109, 101],
    13: [184, 171, 158, 145, 132, 119, 106, 93, 80, 67, 54, 41],
    16: [181, 165, 149, 133, 117, 101, 85, 69, 53, 37, 21, 11],
}
DECREASING = {
    8: [181, 167, 154, 143, 133, 125, 118, 113, 109, 107, 106, 106],
    13: [171, 148, 127, 109, 93, 79, 68, 59, 52, 48, 46, 46],
    16: [165, 136, 110, 87, 67, 50, 36, 25, 17, 12, 10, 10],
}
PITOME = {
    0.9: [178, 161, 145, 131, 118, 107, 97, 88, 80, 73, 66, 60],
    0.925: [183, 170, 158, 147, 137, 127, 118, 110, 102, 95, 88, 82],
    0.95: [188, 179, 171, 163, 155, 148, 141, 134, 128, 122, 116, 111],
}
EVIT = {0.5: [100, 52, 28], 0.6: [120, 74, 46], 0.7: [140, 100, 72], 0.8: [159, 129, 105], 0.9: [179, 163, 148]}
EVIT_DROP = {0.5: [99, 50, 26], 0.6: [119, 72, 44], 0.7: [139, 98, 69], 0.8: [158, 127, 102], 0.9: [178, 161, 145]}


class TestPublishedTables:
    @pytest.mark.parametrize("r", TOME)
    def test_tome_constant(self, r: int) -> None:
        assert merged("tome", r=r) == TOME[r]

    @pytest.mark.parametrize("r", DECREASING)
    def test_tome_decreasing(self, r: int) -> None:
        assert merged("tome", r=r, inflection=-1.0) == DECREASING[r]

    def test_tome_large(self) -> None:
        assert merged("tome", depth=24, r=8)[-2:] == [13, 7]

    def test_tome_increasing_is_decreasing_backwards(self) -> None:
        down = [int(c.amount) for c in counts("tome", r=8, inflection=-1.0)[1]]
        up = [int(c.amount) for c in counts("tome", r=8, inflection=1.0)[1]]
        assert down == [16, 14, 13, 11, 10, 8, 7, 5, 4, 2, 1, 0]
        assert up == down[::-1]

    def test_tome_between(self) -> None:
        """r_min = int(r (1 - inflection)), r_max = 2 r - r_min: 13 and -0.5 give 19 down to 7."""
        amounts = [int(c.amount) for c in counts("tome", r=13, inflection=-0.5)[1]]
        assert (amounts[0], amounts[-1]) == (19, 7)

    @pytest.mark.parametrize("ratio", PITOME)
    def test_pitome(self, ratio: float) -> None:
        assert merged("pitome", ratio=ratio) == PITOME[ratio]

    @pytest.mark.parametrize("keep", EVIT)
    @pytest.mark.parametrize("fused", [1, 0])
    def test_evit(self, keep: float, fused: int) -> None:
        layers, chosen = counts("evit", keep=keep)
        assert layers == (3, 6, 9)
        n, lengths = 197, []
        for count in chosen:
            n = 1 + count.kept(B, n - 1, 196) + fused
            lengths.append(n)
        assert lengths == (EVIT if fused else EVIT_DROP)[keep]

    def test_spatten(self) -> None:
        """Three layers keep everything, then the share falls linearly to a half of 64 words."""
        _, chosen = counts("spatten-topk", keep=0.5)
        expected = [64] * 3 + [int(64 * (1 - 0.5 * (i + 1) / 9) + 0.5) for i in range(9)]
        assert [c.kept(B, 64, 64) for c in chosen] == expected
        assert expected[-1] == 32

    def test_power_bert_never_grows(self) -> None:
        _, chosen = counts("power-bert")
        lengths = [c.kept(B, 128, 128) for c in chosen]
        assert lengths[:2] == [128, 128]
        assert lengths[-1] == 32
        assert all(a >= b for a, b in pairwise(lengths))

    def test_ltp(self) -> None:
        layers, chosen = counts("ltp", keep=0.4)
        assert layers == tuple(range(1, 12))
        assert chosen[-1].kept(B, 100, 100) == 40

    def test_divprune(self) -> None:
        assert counts("divprune")[1][0].kept(B, 576, 576) == 56

    def test_a_tome_rate(self) -> None:
        """Four layers at the same rate remove 20 % together."""
        layers, chosen = counts("a-tome")
        assert layers == (1, 4, 7, 10)
        share = float(chosen[0].amount)
        assert share**4 == pytest.approx(0.8, abs=1e-5)

    @pytest.mark.parametrize(("stride", "kept"), [(1, 1500), (2, 750), (7, 214)])
    def test_audio_avgpool(self, stride: int, kept: int) -> None:
        (count,) = counts("audio-avgpool", stride=stride)[1]
        assert count.kept(B, 1500, 1500) == kept
        assert count.nothing == (stride == 1)


class TestForms:
    def test_a_share_is_the_decimal_that_was_written(self) -> None:
        """0.55 * 100 is 55.00000000000001 in binary, whose ceiling is 56."""
        (count,) = resolve_budget(Budget(keep=0.55), (0,), 1)
        assert count.kept(B, 100, 100) == 55

    def test_a_compound_share_is_of_the_beginning(self) -> None:
        """int(196 * 0.7 ** k), where rounding at each layer would give 95 after the second."""
        chosen = resolve_budget(Budget(keep=0.7, of="initial", rounding="floor", compound=True), (2, 5, 8), 12)
        assert [count.kept(B, 196, 196) for count in chosen] == [137, 96, 67]

    @pytest.mark.parametrize(("rounding", "kept"), [("ceil", 3), ("floor", 2), ("round", 3)])
    def test_rounding(self, rounding: str, kept: int) -> None:
        (count,) = resolve_budget(Budget(keep=0.5, rounding=rounding), (0,), 1)
        assert count.kept(B, 5, 5) == kept

    @pytest.mark.parametrize("rounding", ["ceil", "floor", "round"])
    def test_one_token_is_kept_at_least(self, rounding: str) -> None:
        (count,) = resolve_budget(Budget(keep=0.01, rounding=rounding), (0,), 1)
        assert count.kept(B, 5, 5) == 1
        assert Count("remove", Fraction(9)).kept(B, 5, 5) == 1

    def test_of_the_initial_number(self) -> None:
        (count,) = resolve_budget(Budget(keep=0.5, of="initial"), (0,), 1)
        assert count.kept(B, 80, 100) == 50
        assert count.kept(B, 30, 100) == 30

    def test_schedule(self) -> None:
        first, second = resolve_budget(Budget(schedule=(137, 0.5)), (2, 4), 12)
        assert first.kept(B, 196, 196) == 137
        assert second.kept(B, 137, 196) == 69
        with pytest.raises(ValueError, match="2 entries for 3 layers"):
            resolve_budget(Budget(schedule=(137, 0.5)), (2, 4, 6), 12)

    def test_tokens_are_no_more_than_there_are(self) -> None:
        (count,) = resolve_budget(Budget(tokens=144), (0,), 1)
        assert [count.kept(B, n, n) for n in (576, 144, 50)] == [144, 144, 50]

    def test_a_cache_budget_is_refused(self) -> None:
        with pytest.raises(ValueError, match="`kv` is not a budget of prune and merge steps"):
            resolve_budget(Budget.model_validate({"kv": {"recent": 4}}), (0,), 1)

    def test_a_ramp_longer_than_the_model_keeps_everything(self) -> None:
        budget = Budget.model_validate({"keep": 0.5, "ramp": {"warmup_layers": 5}})
        assert all(count.nothing for count in resolve_budget(budget, (0, 1, 2), 3))


def _budgets() -> st.SearchStrategy[Budget]:
    share = st.integers(1, 100).map(lambda p: p / 100)
    rounding = st.sampled_from(["ceil", "floor", "round"])
    return st.one_of(
        st.builds(lambda k, r: Budget(keep=k, rounding=r), share, rounding),
        st.builds(lambda t: Budget(tokens=t), st.integers(1, 40)),
        st.builds(lambda r: Budget(remove=r), st.integers(0, 40)),
        st.builds(lambda s: Budget(stride=s), st.integers(1, 9)),
        st.builds(lambda k: Budget(keep=k, of="initial"), share),
    )


@given(_budgets(), st.lists(st.tuples(st.integers(1, 60), st.integers(0, 30)), min_size=1, max_size=5))
def test_samples_count_as_they_do_alone(budget: Budget, sizes: Sequence[tuple[int, int]]) -> None:
    """The per-sample form on tensors is the form on ints; a shorter sample never keeps more than a longer one."""
    (count,) = resolve_budget(budget, (0,), 1)
    current = torch.tensor([n for n, _ in sizes])
    initial = current + torch.tensor([more for _, more in sizes])
    alone = [count.kept(B, n, n + more) for n, more in sizes]
    assert count.kept_per_sample(B, current, initial).tolist() == alone
    assert all(1 <= kept <= n for kept, (n, _) in zip(alone, sizes, strict=True))
    for n in range(1, 40):
        assert count.kept(B, n, n) <= count.kept(B, n + 1, n + 1)
        assert (count.kept(B, n, n) == n) or not count.nothing
