"""LongMamba (arXiv:2504.16053) against a scan that runs, channel by channel, over the tokens that it takes in alone."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

import tokcc
from tests.decoders.bundles import model_folder
from tests.decoders.mamba import LAYERS, engine, mamba, padded, program, read, reduced
from tests.decoders.tiny import program_of
from tests.zoo.models import ZOO
from tokcc.analysis.scan_numbers import remembered, thresholds
from tokcc.analysis.state_sites import state_sites
from tokcc.backends.calls import decoder_calls
from tokcc.backends.parity import oracle
from tokcc.cli.app import main
from tokcc.config import load_policy
from tokcc.errors import PlanError, PolicyError, TokccError
from tokcc.passes.methods import library
from tokcc.pipeline.profiling_scans import profile_scans
from tokcc.pipeline.reducing import reduce_program
from tokcc.pipeline.stages import Stages
from tokcc.testing import trace

Array = npt.NDArray[np.float64]
Thresholds = Callable[[int, int], Array | None]
"""From a layer and the length of a text so far to the threshold of each channel; None = everything is taken in."""

TRAINED, LENGTHS, CHANNELS = 12, (12, 20, 40), 32
CALLS = (10, 1, 1, 1, 1, 6, 1, 1, 14, 1, 1)
"""Lengths of 10 to 16 are scanned whole, from 17 on with the thresholds for 20, from 31 on with those for 40."""
PADDING = 4


def array(x: Tensor) -> Array:
    return x.detach().numpy().astype(np.float64)


class Alone:
    """One row, without padding, read call by call: Mamba's formulas (arXiv:2312.00752, algorithm 2) in numpy."""

    def __init__(self, threshold: Thresholds) -> None:
        self.model, self.threshold = mamba(), threshold
        self.seen = 0
        self.windows = [np.zeros((4, CHANNELS)) for _ in range(LAYERS)]
        self.states = [np.zeros((CHANNELS, 4)) for _ in range(LAYERS)]
        self.steps: list[list[Array]] = [[] for _ in range(LAYERS)]
        self.left_out = 0

    def read(self, ids: Tensor) -> Array:
        """Return logits ``[S, V]`` of a call."""
        self.seen += len(ids)
        backbone = self.model.backbone
        x = array(backbone.embeddings.weight[ids])
        for layer, block in enumerate(backbone.layers):
            x = x + self._mixed(layer, block.mixer, self._normed(x, block.norm))
        return self._normed(x, backbone.norm_f) @ array(self.model.lm_head.weight).T

    def _normed(self, x: Array, norm: Any) -> Array:
        scale = np.sqrt((x * x).mean(1, keepdims=True) + norm.variance_epsilon)
        return x / scale * array(norm.weight)

    def _mixed(self, layer: int, mixer: Any, x: Array) -> Array:
        both = x @ array(mixer.in_proj.weight).T
        u, gate = both[:, :CHANNELS], both[:, CHANNELS:]
        line = np.concatenate([self.windows[layer], u])
        self.windows[layer] = line[-4:]
        kernel = array(mixer.conv1d.weight)[:, 0].T  # [4, D]
        own = len(line) - len(u)
        c = np.stack([(line[t - 3 : t + 1] * kernel).sum(0) for t in range(own, len(line))])
        c = c + array(mixer.conv1d.bias)
        c = c / (1 + np.exp(-c))
        made = c @ array(mixer.x_proj.weight).T
        b, out = made[:, 3:7], made[:, 7:]
        dt = made[:, :3] @ array(mixer.dt_proj.weight).T + array(mixer.dt_proj.bias)
        dt = np.log1p(np.exp(-np.abs(dt))) + np.maximum(dt, 0)
        self.steps[layer].append(dt)
        rates, skip = -np.exp(array(mixer.A_log)), array(mixer.D)
        limit = self.threshold(layer, self.seen)
        y = np.zeros_like(c)
        for channel in range(CHANNELS):
            taken = [t for t in range(len(c)) if limit is None or dt[t, channel] > limit[channel]]
            self.left_out += len(c) - len(taken)
            state = self.states[layer][channel]
            for t in range(len(c)):
                if t in taken:  # the scan of a text that holds nothing but these tokens
                    step = dt[t, channel]
                    state = np.exp(rates[channel] * step) * state + step * b[t] * c[t, channel]
                y[t, channel] = out[t] @ state + skip[channel] * c[t, channel]
            self.states[layer][channel] = state
        return (y * (gate / (1 + np.exp(-gate)))) @ array(mixer.out_proj.weight).T


def rows_of(mask: Tensor, calls: tuple[int, ...], row: int) -> list[slice]:
    """Return the real tokens of each call of a row."""
    first = int((mask[row] == 0).sum())
    ends = np.cumsum(calls)
    return [slice(max(end - call, first), end) for end, call in zip(ends, calls, strict=True)]


def steps_of(ids: Tensor) -> list[Array]:
    """Return the step sizes ``[S, D]`` of each layer."""
    alone = Alone(lambda layer, seen: None)
    alone.read(ids)
    return [each[0] for each in alone.steps]


def measured() -> dict[str, Tensor]:
    """Thresholds that some tokens pass and others do not, and channels of which every third does not remember."""
    tensors = {"lengths": torch.tensor(LENGTHS)}
    for layer, steps in enumerate(steps_of(padded(1, 40, seed=7)[0][0])):
        levels = np.quantile(steps, [0.35, 0.7], axis=0)
        tensors[f"layers.{layer}.thresholds"] = torch.from_numpy(levels).float()
        tensors[f"layers.{layer}.decay"] = torch.tensor([0.0 if i % 3 == 0 else 0.5 for i in range(CHANNELS)])
    return tensors


def step(folder: Path, tensors: Mapping[str, Tensor] | None = None, **more: Any) -> dict[str, Any]:
    path = folder / "scans.safetensors"
    save_file(dict(measured() if tensors is None else tensors), path)
    return {"preset": "longmamba", "weights": str(path), "train_length": TRAINED, **more}


def policy(*steps: Mapping[str, Any]) -> dict[str, Any]:
    return {"version": 1, "name": "longmamba", "steps": list(steps)}


def by_formula(tensors: Mapping[str, Tensor]) -> Thresholds:
    """The threshold of the measured length that is nearest to a text's; none for texts as short as the training's."""

    def limit(layer: int, seen: int) -> Array | None:
        nearest = min(LENGTHS, key=lambda length: abs(length - seen))
        if nearest == TRAINED:
            return None
        row = array(tensors[f"layers.{layer}.thresholds"])[LENGTHS.index(nearest) - 1]
        return np.where(array(tensors[f"layers.{layer}.decay"]) > 1e-30, row, -1.0)

    return limit


def close(got: Tensor, wanted: Array) -> None:
    assert np.abs(got.numpy() - wanted).max() <= 2e-5 * np.abs(wanted).max()


def test_each_row_equals_a_scan_of_the_tokens_that_are_taken_in(tmp_path: Path) -> None:
    tensors = measured()
    ids, mask = padded(3, sum(CALLS), PADDING)
    calls = list(read(engine(policy(step(tmp_path)), tmp_path), ids, mask, CALLS))
    for row in range(3):
        alone, plain = Alone(by_formula(tensors)), Alone(lambda layer, seen: None)
        changed = 0.0
        for number, tokens in enumerate(rows_of(mask, CALLS, row)):
            wanted, whole = alone.read(ids[row, tokens]), plain.read(ids[row, tokens])
            logits, states = calls[number]
            close(logits[row, -len(wanted) :], wanted)
            for layer in range(LAYERS):
                close(states[f"past_key_values.{layer}.ssm_state"][row], alone.states[layer])
                close(states[f"past_key_values.{layer}.conv_state"][row], alone.windows[layer].T)
            if alone.seen <= 16:
                assert alone.left_out == 0
                assert np.array_equal(wanted, whole)
            changed = max(changed, np.abs(wanted - whole).max() / np.abs(whole).max())
        assert alone.left_out > 50
        assert changed > 1e-2


def test_one_long_prompt(tmp_path: Path) -> None:
    ids, mask = padded(1, 37, seed=3)
    logits, _ = next(read(engine(policy(step(tmp_path)), tmp_path), ids, mask, (37,)))
    close(logits[0], Alone(by_formula(measured())).read(ids[0]))


def same(one: dict[str, Any], tmp_path: Path, tokens: int, *, equal: bool) -> None:
    ids, mask = padded(2, tokens, 2)
    plain, other = (tmp_path / name for name in ("plain", "other"))
    for folder in (plain, other):
        folder.mkdir()
    (wanted, _), (got, _) = (
        next(read(engine(each, folder), ids, mask, (tokens,))) for each, folder in (("none", plain), (one, other))
    )
    assert torch.equal(got[0], wanted[0]) == equal


@pytest.mark.parametrize(("tokens", "equal"), [(TRAINED, True), (16, True), (17, False)])
def test_texts_up_to_the_length_of_the_training_are_scanned_whole(tmp_path: Path, tokens: int, equal: bool) -> None:
    same(policy(step(tmp_path)), tmp_path, tokens, equal=equal)


def test_a_threshold_of_zero_takes_everything_in(tmp_path: Path) -> None:
    tensors = {name: x * 0 if "thresholds" in name else x for name, x in measured().items()}
    same(policy(step(tmp_path, tensors)), tmp_path, 30, equal=True)


def test_channels_that_forget_are_left_alone(tmp_path: Path) -> None:
    made = reduced(policy(step(tmp_path, remembers=0.6)))
    assert made.scans is not None
    assert made.scans.filters == ()
    assert made.program is made.original


def test_layers_may_be_chosen(tmp_path: Path) -> None:
    tensors = measured()
    made = engine(policy(step(tmp_path, at={"layers": [1]})), tmp_path)
    ids, mask = padded(1, 25, seed=4)
    logits, _ = next(read(made, ids, mask, (25,)))
    limit = by_formula(tensors)
    close(logits[0], Alone(lambda layer, seen: limit(layer, seen) if layer == 1 else None).read(ids[0]))


def test_the_last_row_alone(tmp_path: Path) -> None:
    one = {**policy(step(tmp_path)), "outputs": {"logits": "last_token"}}
    ids, mask = padded(1, 25, seed=4)
    logits, _ = next(read(engine(one, tmp_path), ids, mask, (25,)))
    assert logits.shape[1] == 1
    close(logits[0], Alone(by_formula(measured())).read(ids[0])[-1:])


def test_the_check_of_a_bundle_meets_the_filter(tmp_path: Path) -> None:
    """Calls are short, and the mask says that texts are long."""
    made = reduced(policy(step(tmp_path)))
    assert made.scans is not None
    assert made.scans.before == 17 - 10
    example = {"input_ids": torch.full([2, 4], 96), "attention_mask": torch.ones(2, 4, dtype=torch.int64)}
    results = [
        decoder_calls(made.program, example, oracle(each), before=made.scans.before)[1]
        for each in (made.original, made.program)
    ]
    first, later = ([abs(a[i][0] - b[i][0]).amax((1, 2)) for a, b in [results]] for i in (0, 4))
    assert (first[0] > 0).tolist() == [True, False, True]  # the second row has padding
    assert (later[0] > 0).all()


def test_thresholds_make_up_the_steps_of_the_training() -> None:
    """Above the threshold, a stretched text has as much as the given one, within one step."""
    steps = torch.rand(50, 6, generator=torch.Generator().manual_seed(0), dtype=torch.float64) ** 3
    for length in (75, 100, 333):
        limit = thresholds(steps, length)
        ordered = steps.sort(0, descending=True).values
        places = ((torch.arange(length).double() + 0.5) * 50 / length - 0.5).clamp(0, 49)
        low = places.floor().long()
        high = (low + 1).clamp(max=49)
        longer = torch.lerp(ordered[low], ordered[high], (places - low)[:, None])
        for channel in range(6):
            kept = longer[:, channel][longer[:, channel] > limit[channel] * (1 + 1e-12)]
            assert kept.sum() > steps[:, channel].sum() >= kept.sum() - kept.min()


def test_what_is_remembered_is_what_a_scan_leaves() -> None:
    generator = torch.Generator().manual_seed(0)
    steps, rates = torch.rand(20, 3, generator=generator) * 0.1, -torch.rand(3, 4, generator=generator)
    state = torch.ones(3, 4, dtype=torch.float64)
    for step_sizes in steps.double():
        state = state * torch.exp(step_sizes[:, None] * rates.double())
    torch.testing.assert_close(remembered(steps, rates), state.mean(1))


def test_a_profile_has_the_model_s_numbers() -> None:
    texts = [padded(1, 20, seed=seed)[0][0] for seed in (1, 2)]
    made = profile_scans(program(), state_sites(program()), texts, {})
    steps = [[torch.from_numpy(each) for each in steps_of(text)] for text in texts]
    assert made.lengths[:3] == (20, 30, 40)
    for layer in range(LAYERS):
        rates = -torch.exp(mamba().backbone.layers[layer].mixer.A_log.detach())
        left = (remembered(steps[0][layer], rates) + remembered(steps[1][layer], rates)) / 2
        limits = (thresholds(steps[0][layer], 40) + thresholds(steps[1][layer], 40)) / 2
        torch.testing.assert_close(torch.tensor(made.decay[layer]), left.float(), rtol=1e-4, atol=1e-9)
        torch.testing.assert_close(torch.tensor(made.thresholds[layer][1]), limits.float(), rtol=1e-4, atol=1e-7)


@pytest.mark.slow
def test_from_a_folder_to_a_bundle(tmp_path: Path) -> None:
    model, file = tmp_path / "model", tmp_path / "scans.safetensors"
    mamba().save_pretrained(model)
    assert main(["profile", str(model), "-o", str(file), "--tokens", "64", "--quiet"]) == 0
    assert load_file(file)["lengths"][:2].tolist() == [64, 96]
    data = tmp_path / "ids.npy"
    np.save(data, padded(1, 150)[0].numpy())
    assert main(["profile", str(model), "-o", str(file), "--tokens", "64", "--data", str(data), "--quiet"]) == 0
    assert main(["profile", str(model), "-o", str(tmp_path / "p.json"), "--tokens", "64", "--quiet"]) == 2
    given = {"preset": "longmamba", "weights": str(file), "train_length": 64}
    bundle = tokcc.compile(model, policy(given), output=tmp_path / "out", task="text-generation", calibrate=False)
    assert bundle.report.parity.passed
    again = load_policy(bundle.path / "policy.lock.yaml", presets=library())
    assert reduce_program(program(), again, Stages()).scans is not None


@pytest.mark.slow
def test_heads_are_not_measured_on_a_text(tmp_path: Path) -> None:
    data = tmp_path / "ids.npy"
    np.save(data, padded(1, 150)[0].numpy())
    given = [str(model_folder(tmp_path / "model")), "-o", str(tmp_path / "p.json"), "--data", str(data), "--quiet"]
    assert main(["profile", *given]) == 2


def refusal(one: Mapping[str, Any], model: Any = None) -> TokccError:
    with pytest.raises((PlanError, PolicyError)) as caught:
        reduce_program(program() if model is None else model, load_policy(one, presets=library()), Stages())
    assert (caught.value.help or "").strip()
    return caught.value


def test_other_models_are_refused(tmp_path: Path) -> None:
    assert "no scans" in refusal(policy(step(tmp_path)), program_of("llama")).what


@pytest.mark.slow
def test_an_encoder_that_scans_is_refused(tmp_path: Path) -> None:
    entry = ZOO["vision_mamba"]
    assert "no states" in refusal(policy(step(tmp_path)), trace(entry.build(), entry.inputs(2), None)).what


@pytest.mark.parametrize(
    ("given", "said"),
    [
        ({"preset": "h2o", "tokens": 8}, "no key-value cache to evict from"),
        ({"preset": "oscar"}, "no key-value cache to store"),
        ({"preset": "tome", "r": 2}, "`merge` steps are not available"),
        ({"preset": "fastv"}, "`prune` steps are not available"),
    ],
)
def test_other_methods_are_refused(given: dict[str, Any], said: str) -> None:
    error = refusal({**policy(given), "segments": {"image": {"input_ids": 90, "tokens": 4}}})
    assert said in error.what
    assert "longmamba" in (error.help or "")


def test_thresholds_must_be_the_model_s(tmp_path: Path) -> None:
    assert "measured, and no weights" in refusal(policy({"preset": "longmamba"})).what
    good = measured()
    assert "step for 13" in refusal(policy(step(tmp_path, train_length=13))).what
    fewer = {name: x for name, x in good.items() if not name.startswith("layers.1")}
    assert "layers.1.thresholds" in refusal(policy(step(tmp_path, fewer))).what
    narrow = {**good, "layers.0.decay": good["layers.0.decay"][:5].clone()}
    assert "does not fit" in refusal(policy(step(tmp_path, narrow))).what
    for lengths in ([12, 12, 40], [12, 40, 20], [12, 20]):
        assert "do not ascend" in refusal(policy(step(tmp_path, {**good, "lengths": torch.tensor(lengths)}))).what


def test_steps_must_make_sense(tmp_path: Path) -> None:
    one = step(tmp_path)
    assert "not at `block_output`" in refusal(policy({**one, "at": {"site": "block_output"}})).what
    share = {name: value for name, value in one.items() if name != "train_length"}
    assert "length up to which" in refusal(policy({**share, "budget": {"keep": 0.5}})).what
    assert "two steps filter" in refusal(policy(one, one)).what
    other = {"node": "filter_scan", "at": {"site": "scan_input"}, "budget": {"tokens": 9}, "select": "abov"}
    assert "did you mean `above`" in (refusal(policy(other)).help or "")
    assert (
        "needs a selector"
        in refusal(policy({"node": "filter_scan", "at": {"site": "scan_input"}, "budget": {"tokens": 9}})).what
    )
