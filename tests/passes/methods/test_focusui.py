"""FocusUI against its enhancers written out and a scan for runs, with random weights in a file."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import save_file
from torch import Tensor

from tests.passes.guided import texts, words_of
from tests.passes.layers import Weights, attention, mlp, mlp_weights, random
from tests.passes.oracle import Cut, Feeds, Model, Result, Scene, at_output, compare, policy, program_of, top
from tests.passes.reference_models import WIDTH, audio, frames, patches, sentences, text, vision
from tokcc.errors import AxisError
from tokcc.testing import run_eager

_HEADS, _TEXT = 4, 20


@pytest.fixture(scope="module")
def scorer(tmp_path_factory: pytest.TempPathFactory) -> tuple[str, Weights]:
    generator = torch.Generator().manual_seed(41)
    weights: dict[str, Tensor] = {"marker": torch.randn(WIDTH, generator=generator)}
    for side, width in (("tokens", WIDTH), ("text", _TEXT)):
        for part in "qkv":
            weights[f"{side}.self_attn.{part}_proj.weight"] = 2 * random(generator, 4 * _HEADS, width)
        weights[f"{side}.self_attn.o_proj.weight"] = 2 * random(generator, width, 4 * _HEADS)
        weights[f"{side}.norm.weight"] = 1 + 0.3 * torch.randn(width, generator=generator)
        weights[f"{side}.norm.bias"] = 0.3 * torch.randn(width, generator=generator)
        weights |= mlp_weights(generator, f"{side}.mlp", [width, width, 12])
    path = tmp_path_factory.mktemp("focusui") / "scorer.safetensors"
    save_file(weights, path)
    return str(path), weights


def step(path: str, **changes: object) -> dict[str, object]:
    return {"preset": "focusui", "weights": path, "query_heads": _HEADS, **changes}


def enhanced(x: Tensor, weights: Weights, side: str) -> Tensor:
    gathered, _ = attention(x, x, weights, f"{side}.self_attn", _HEADS, _HEADS)
    assert gathered is not None
    y = F.layer_norm(x + gathered, x.shape[1:], weights[f"{side}.norm.weight"], weights[f"{side}.norm.bias"])
    return F.normalize(torch.tanh(mlp(y, weights, f"{side}.mlp", 2, "gelu")), dim=1)


def likeness(z: Tensor, words: Tensor, weights: Weights) -> list[float]:
    table: Tensor = enhanced(z, weights, "tokens") @ enhanced(words, weights, "text").T
    means: list[float] = table.mean(1).tolist()
    return means


def run_ends(kept: list[int], size: int) -> list[int]:
    """Go through the tokens and note the last one of every run that is dropped."""
    ends, running = [], False
    for i in range(size):
        if i in kept and running:
            ends.append(i - 1)
        running = i not in kept
    return [*ends, size - 1] if running else ends


def oracle(
    model: Model, protected: int, weights: Weights, count: int, most: int | None = None
) -> Callable[[Feeds], Result]:
    def run(sample: Feeds) -> Result:
        def method(scene: Scene) -> Cut:
            z = scene.x[protected:]
            kept = top(likeness(z, words_of(sample), weights), range(len(z)), count)
            marks = run_ends(kept, len(z))[:most]
            places = sorted([*kept, *marks])
            x = torch.stack([weights["marker"] if i in marks else z[i] for i in places])
            return Cut([*range(protected), *[i + protected for i in places]], torch.cat([scene.x[:protected], x]))

        return at_output(model, method)(sample)

    return run


def test_images(scorer: tuple[str, Weights]) -> None:
    """Different numbers of runs in the samples of a batch: the others' slots are empty."""
    path, weights = scorer
    feeds = {"patches": patches(4, 37), **texts([3, 1, 2, 5], width=_TEXT)}
    run = oracle(vision(), 1, weights, 18)
    results = compare(vision(), feeds, step(path), run, traced={"patches": patches(4, 37)}, engine=True)
    assert len({result.lengths[0] for result in results}) > 1


@pytest.mark.parametrize(("keep", "count", "most"), [(0.25, 7, 3), (0.9, 27, None), (0.1, 3, 0)])
def test_bounded_slots(scorer: tuple[str, Weights], keep: float, count: int, most: int | None) -> None:
    """Runs beyond the bound are dropped without a mark; fewer dropped tokens than kept ones bound it, too."""
    path, weights = scorer
    feeds = {"frames": frames(3, 30), **texts([2, 2, 1], width=_TEXT)}
    changes = {"keep": keep, **({} if most is None else {"markers": most})}
    run = oracle(audio(), 0, weights, count, most)
    compare(audio(), feeds, step(path, **changes), run, traced={"frames": frames(3, 30)})


def test_keeping_every_other_token_marks_all_others(scorer: tuple[str, Weights]) -> None:
    feeds = {"frames": frames(1, 12)}
    policy_ = policy(
        {
            "node": "prune",
            "at": {"site": "encoder_output"},
            "select": {"kind": "uniform"},
            "reduce": {"kind": "mark_runs", "weights": scorer[0]},
            "budget": {"tokens": 6},
        }
    )
    outputs, plan = run_eager(program_of(audio(), feeds), policy_, feeds)
    index = plan.made[0].index[0].tolist()
    assert index == list(range(12))
    assert bool(plan.made[0].valid.all())
    kept = [i for i in index if not torch.allclose(outputs[0][0, i], scorer[1]["marker"])]
    assert len(kept) == 6


def test_runs_of_padded_samples_are_refused(scorer: tuple[str, Weights]) -> None:
    feeds = {**sentences([20, 12]), **texts([1, 1], width=_TEXT)}
    with pytest.raises(AxisError, match="runs are marked"):
        run_eager(program_of(text(), sentences([20, 12])), policy(step(scorer[0])), feeds)
