"""FASA (arXiv:2602.03152): the tokens with the largest products in a few frequency pairs, and how those are found."""

from __future__ import annotations

import json
from fractions import Fraction
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
import torch
import transformers
from torch import Tensor

from tests.decoders.bundles import compiled, model_folder
from tests.decoders.engine import build
from tests.decoders.tiny import FAMILIES, decoder_program, program_of, random_model
from tests.sparse.eager import cut_of, look_alike
from tests.sparse.engine import assert_equals_rule, policy
from tests.sparse.oracle import Look, Rule
from tokcc.analysis.cache_sites import cache_sites
from tokcc.analysis.head_numbers import Heard
from tokcc.analysis.pair_numbers import PairAgreement
from tokcc.analysis.rotation_pairs import channel_pairs, pairs_of
from tokcc.errors import PolicyError
from tokcc.ir.program import Program
from tokcc.passes.budget import Count
from tokcc.passes.sparse.scores.label_products import LabelProducts
from tokcc.passes.sparse.scores.products import Products
from tokcc.passes.sparse.selectors.best_blocks import BestBlocks
from tokcc.pipeline import profile

TOKENS, COUNT, WIDTH = 9, 3, 16
SLOTS = {"kv": {"layout": "slots", "tokens": 64}}
Array = npt.NDArray[Any]


def half_split(pair: int) -> tuple[int, int]:
    """The channels of a pair in models that turn the first half against the second."""
    return pair, pair + WIDTH // 2


def orders(heads: int, seed: int = 0) -> list[list[list[int]]]:
    """The pairs of three layers by number, the most telling first."""
    rng = np.random.default_rng(seed)
    return [[rng.permutation(WIDTH // 2).tolist() for _ in range(heads)] for _ in range(3)]


def in_channels(order: list[list[list[int]]]) -> list[list[list[tuple[int, int]]]]:
    return [[[half_split(pair) for pair in row] for row in layer] for layer in order]


def pair_rule(order: list[list[list[int]]], share: str) -> Rule:
    """The best tokens by the sum over pairs of ``q . k``, the newest always, token by token."""

    def rule(look: Look) -> Tensor | None:
        if look.new > 1:
            return None
        heads, own = look.query.shape[0], order[look.layer]
        query, key = look.query[:, 0].double().numpy(), look.repeated.double().numpy()
        score = np.zeros((heads, look.total))
        for head in range(heads):
            for token in range(look.total):
                for pair in own[head * len(own) // heads][:COUNT]:
                    a, b = half_split(pair)
                    score[head, token] += query[head, a] * key[head, token, a] + query[head, b] * key[head, token, b]
        read = torch.zeros(heads, 1, look.total, dtype=torch.bool)
        group = heads // len(look.key)
        for head in range(heads):
            mine = score[head // group * group : (head // group + 1) * group].max(0) if share != "each" else score[head]
            best = np.argsort(-mine[:-1], kind="stable")[: TOKENS - 1].tolist()
            read[head, 0, [look.total - 1, *best]] = True
        return read

    return rule


def wanted(folder: Path, measured: dict[str, Any], slots: bool = True, **changes: Any) -> dict[str, Any]:
    path = folder / "profile.json"
    path.write_text(json.dumps(measured))
    given = {"tokens": TOKENS, "pairs": COUNT, "profile": str(path), "length": 0, **changes}
    return {**policy("fasa", **given), **(SLOTS if slots else {})}


@pytest.mark.parametrize(
    ("family", "kv_heads", "slots"),
    [
        ("llama", 2, True),
        pytest.param("llama", 2, False, marks=pytest.mark.slow),
        pytest.param("llama-mqa", 1, True, marks=pytest.mark.slow),
    ],
)
def test_every_row_reads_the_best_tokens(family: str, kv_heads: int, slots: bool, tmp_path: Path) -> None:
    order = orders(kv_heads)
    given = wanted(tmp_path, {"key_pairs": in_channels(order)}, slots)
    engine = assert_equals_rule(family, given, pair_rule(order, "group_max"), tmp_path, padding=(0, 3, 5))
    labels = {item.name: item.shape for item in engine.session.get_inputs()}["past_key_values.1.key_labels"]
    assert (labels[1], labels[3]) == (kv_heads, 2 * COUNT)
    score = engine.plan.to_dict()["steps"][0]["score"]
    assert score["channels"] == [
        [[list(pair) for pair in row[:COUNT]] for row in layer] for layer in in_channels(order)
    ]


@pytest.mark.slow
def test_pairs_and_lists_of_every_query_head(tmp_path: Path) -> None:
    order = orders(4, 1)
    given = wanted(tmp_path, {"query_pairs": in_channels(order)}, of="query", share="each")
    assert_equals_rule("llama", given, pair_rule(order, "each"), tmp_path, padding=(0, 3, 5), calls=(37, 1, 1, 18, 1))


def test_one_row(tmp_path: Path) -> None:
    order = orders(2, 2)
    given = wanted(tmp_path, {"key_pairs": in_channels(order)})
    assert_equals_rule("llama", given, pair_rule(order, "group_max"), tmp_path, padding=(0,), calls=(20, 1, 1))


def test_reading_everything_is_dense(tmp_path: Path) -> None:
    given = wanted(tmp_path, {"key_pairs": in_channels(orders(2))}, tokens=64)
    assert_equals_rule("llama", given, lambda look: None, tmp_path, padding=(0, 3), calls=(20, 1, 1))


def score_of(pairs: list[tuple[int, int]], query: Tensor, key: Tensor) -> tuple[LabelProducts, Any]:
    """The score of one layer with the same pairs for all heads, and a cut whose labels are there."""
    kv_heads = key.shape[1]
    channels = ((tuple(pairs),) * kv_heads,)
    score = LabelProducts(units="pairs", count=len(pairs), channels=channels)
    flat = [channel for pair in pairs for channel in pair]
    return score, cut_of(query, key, 1, 1, states={"key_labels": key[..., flat]}, single=True)


def test_all_pairs_find_what_all_channels_do() -> None:
    query, key = look_alike(4, 2, 1, 40, width=8)
    pairs = [(i, i + 4) for i in (2, 0, 3, 1)]
    score, cut = score_of(pairs, query, key)
    torch.testing.assert_close(score.emit(cut), Products().emit(cut))
    exact = (query[0].reshape(2, 2, 8) @ key[0].transpose(1, 2)).amax(1)[:, :-1].topk(6).indices
    chosen = BestBlocks(share="group_max").select(cut, score.emit(cut), Count("tokens", Fraction(7)))
    for head in range(2):
        assert set(chosen.index[0, head, 0, :7].tolist()) == {39, *exact[head].tolist()}


def test_other_channels_say_nothing() -> None:
    query, key = look_alike(4, 2, 1, 40, width=8)
    pairs = [(1, 5), (3, 7)]
    score, cut = score_of(pairs, query, key)
    rest = [0, 2, 4, 6]
    silent = query.clone(), key.clone()
    for x in silent:
        x[..., rest] = 0
    again, other = score_of(pairs, *silent)
    assert torch.equal(score.emit(cut), again.emit(other))
    torch.testing.assert_close(again.emit(other), Products().emit(other))


def program_with_neighbours() -> Program:
    """A decoder whose channels ``2 * i`` and ``2 * i + 1`` are turned together."""
    return decoder_program(random_model(transformers.CohereConfig(**FAMILIES["llama"][1]), "sdpa"))


def pairs_in(program: Program) -> Any:
    nodes = {node.name: node for node in program.graph.nodes}
    return channel_pairs(program, nodes[cache_sites(program)[1].new_key])


def test_pairs_lie_as_the_model_has_them() -> None:
    assert pairs_in(program_of("llama")) == tuple(map(half_split, range(8)))


@pytest.mark.slow
def test_pairs_of_other_layouts() -> None:
    assert pairs_in(program_with_neighbours()) == tuple((i, i + 1) for i in range(0, 16, 2))
    turned = ((0, 2), (1, 3))  # a quarter of the channels
    assert pairs_in(program_of("gpt-neox")) == (*turned, *((i, i + 1) for i in range(4, 16, 2)))
    assert pairs_in(program_of("gpt2")) is None


def test_what_is_no_rotation_in_pairs() -> None:
    three = torch.eye(4, dtype=torch.bool)
    three[0, 1] = three[1, 2] = True
    assert pairs_of(three) is None
    assert pairs_of(torch.eye(4, dtype=torch.bool)) == ((0, 1), (2, 3))


def agreement(query: Array, key: Array, pairs: list[tuple[int, int]], group: int) -> Array:
    """The agreement of every pair with all channels, ``[H, pairs]``, written out."""
    length = query.shape[1]
    most, asked = length // 8, sorted({int(x) for x in np.linspace(length // 2, length - 1, 32)})
    table = np.zeros((len(query), len(pairs)))
    for head in range(len(query)):
        own = key[head // group]
        for row in asked:
            best = set(sorted(range(row + 1), key=lambda n: -own[n] @ query[head, row])[:most])
            for number, (a, b) in enumerate(pairs):
                alone = [query[head, row, a] * own[n, a] + query[head, row, b] * own[n, b] for n in range(row + 1)]
                found = set(sorted(range(row + 1), key=lambda n: -alone[n])[:most])
                table[head, number] += len(best & found) / most / len(asked)
    return table


def test_pairs_are_ordered_by_what_they_find() -> None:
    generator, pairs = torch.Generator().manual_seed(0), [(i, i + 4) for i in range(4)]
    found = PairAgreement({0: tuple(pairs)})
    tables = np.zeros((4, 4))
    for _ in range(2):
        query, key, value = (torch.randn(heads, 80, 8, generator=generator) for heads in (4, 2, 2))
        query *= torch.linspace(2.0, 0.5, 4).repeat(2)
        found.hear(Heard(0, query, key, value, 0, 1.0, 0.0))
        tables += agreement(query.numpy(), key.numpy(), pairs, 2)
    np.testing.assert_allclose(found.sums[0].numpy(), tables, atol=1e-5)
    by_query, by_key = found.of_query_heads(), found.of_key_heads()
    assert by_query is not None
    assert by_key is not None
    for head in range(4):
        assert list(by_query[0][head]) == [pairs[n] for n in np.argsort(-tables[head].round(5), kind="stable")]
    for head in range(2):
        both = tables[2 * head] + tables[2 * head + 1]
        assert list(by_key[0][head]) == [pairs[n] for n in np.argsort(-both.round(5), kind="stable")]


def test_one_pair_alone_agrees_with_itself() -> None:
    """The agreement of the full set is 1."""
    query, key, value = (torch.randn(2, 64, 2, generator=torch.Generator().manual_seed(i)) for i in range(3))
    found = PairAgreement({0: ((0, 1),)})
    found.hear(Heard(0, query, key, value, 0, 1.0, 0.0))
    assert found.sums[0].flatten().tolist() == [1.0, 1.0]


@pytest.mark.slow
def test_a_profile_serves_the_preset(tmp_path: Path) -> None:
    folder, path = model_folder(tmp_path / "model"), tmp_path / "heads.json"
    made = profile(folder, tokens=64)
    assert made.key_pairs is not None
    assert made.query_pairs is not None
    assert [len(layer) for layer in made.key_pairs] == [2, 2, 2]
    for layer in made.query_pairs:
        assert [sorted(head) for head in layer] == [list(map(half_split, range(8)))] * 4
    made.save(path)
    step = {"preset": "fasa", "profile": str(path), "pairs": 2, "tokens": 4, "length": 0}
    bundle = compiled(folder, tmp_path / "bundle", {"version": 1, "name": "f", "steps": [step]})
    assert str(path) not in (bundle.path / "policy.lock.yaml").read_text()


def test_what_is_refused(tmp_path: Path) -> None:
    with pytest.raises(PolicyError, match="no pairs are given: name a `profile`"):
        build("llama", policy("fasa"), tmp_path)
    with pytest.raises(PolicyError, match="heads have 8 pairs in the table, and 9"):
        build("llama", wanted(tmp_path, {"key_pairs": in_channels(orders(2))}, pairs=9), tmp_path)
    with pytest.raises(PolicyError, match="heads have pairs in the table, each of 2"):
        build("llama", wanted(tmp_path, {"key_pairs": orders(2)}), tmp_path)
    with pytest.raises(PolicyError, match="has no entry `query_pairs`"):
        build("llama", wanted(tmp_path, {"key_pairs": in_channels(orders(2))}, of="query"), tmp_path)
