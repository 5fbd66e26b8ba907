"""VisionZip (arXiv:2412.04467) and the encoder's step of VisionDrop against loops in Python."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor
from torch.export import Dim

from tests.passes.oracle import (
    Cut,
    Method,
    Scene,
    at_output,
    compare,
    cosine,
    inputs_of,
    policy,
    program_of,
    reference,
    top,
)
from tests.passes.reference_models import audio, frames, patches, sentences, text, vision
from tokcc.errors import AxisError, PlanError
from tokcc.passes.methods import library
from tokcc.testing import run_eager


def assigned(scene: Scene, others: list[int], targets: list[int]) -> list[tuple[int, int]]:
    key = scene.keys.mean(0)
    return [(j, max(targets, key=lambda c: cosine(key[j], key[c]))) for j in others]


def visionzip(count: int, contextual: int, protected: int = 1) -> Method:
    def method(scene: Scene) -> Cut | None:
        score = (scene.rows[-1].sum(0) if protected else scene.probs.mean(0).mean(0)).tolist()
        best = sorted(top(score, range(protected, scene.n), count - contextual))
        rest = [i for i in range(protected, scene.n) if i not in best]
        stride = max(1, len(rest) // contextual)
        targets = rest[::stride][:contextual]
        pairs = assigned(scene, [i for i in rest if i not in targets], targets)
        made: list[Tensor] = []
        for c in targets:
            joined = [scene.x[j] for j, to in pairs if to == c]
            made.append(scene.x[c] + (torch.stack(joined).mean(0) if joined else 0))
        kept = [*range(protected), *best]
        return Cut([*kept, *targets], torch.stack([*scene.x[kept], *made]), pairs)

    return method


@pytest.mark.parametrize(("tokens", "contextual"), [(20, 5), (12, 1), (9, 9), (60, 30)])
def test_images(tokens: int, contextual: int) -> None:
    step = {"preset": "visionzip", "tokens": tokens, "contextual": contextual}
    results = compare(
        vision(),
        {"patches": patches(3, 65)},
        step,
        at_output(vision(), visionzip(tokens, contextual)),
        full=True,
        engine=True,
    )
    assert results[0].lengths == [tokens + 1]
    assert len(results[0].cuts[0].pairs) == 64 - tokens


def test_without_a_class_token() -> None:
    """Rated by what every token receives; the preset as it is says that the model has no class token."""
    feeds = {"frames": frames(2, 30)}
    with pytest.raises(PlanError, match="class token"):
        run_eager(program_of(audio(), feeds), policy({"preset": "visionzip", "tokens": 12}), feeds)
    step = {"preset": "visionzip", "tokens": 12, "contextual": 4, "score": {"kind": "attention_received"}}
    compare(audio(), feeds, step, at_output(audio(), visionzip(12, 4, 0)), full=True)


@pytest.mark.slow
def test_dynamic_number_of_tokens() -> None:
    shapes = {"patches": {0: Dim("batch", min=1, max=9), 1: Dim("sequence", min=20, max=100)}}
    step = {"preset": "visionzip", "tokens": 12, "contextual": 3}
    for tokens in (50, 31):
        compare(
            vision(2),
            {"patches": patches(3, tokens)},
            step,
            at_output(vision(2), visionzip(12, 3)),
            dynamic=shapes,
            traced={"patches": patches(2, 26)},
            engine=True,
        )


def test_all_tokens_are_the_model_as_it_is() -> None:
    feeds = {"patches": patches(2, 31)}
    program = program_of(vision(), feeds)
    outputs, _ = run_eager(program, policy({"preset": "visionzip", "tokens": 30}), feeds)
    for sample, mine in zip(inputs_of(feeds), outputs[0], strict=True):
        assert torch.allclose(mine, reference(vision(), sample, None).tokens, atol=1e-5)


def test_visiondrop_is_the_same_step_with_other_numbers() -> None:
    feeds = {"patches": patches(2, 65)}
    program = program_of(vision(), feeds)
    steps = ["visiondrop", {"preset": "visionzip", "tokens": 48, "contextual": 6}]
    outputs = [run_eager(program, policy(step), feeds)[0] for step in steps]
    for mine, theirs in zip(*outputs, strict=True):
        assert torch.equal(mine, theirs)
    compare(vision(), feeds, "visiondrop", at_output(vision(), visionzip(48, 6)))


def test_refusals() -> None:
    feeds = {"patches": patches(2, 31)}
    with pytest.raises(AxisError, match="5 tokens are kept, and 10"):
        run_eager(program_of(vision(), feeds), policy({"preset": "visionzip", "tokens": 5}), feeds)
    padded = sentences([20, 12])
    with pytest.raises(AxisError, match="padded batch"):
        run_eager(program_of(text(), padded), policy({"preset": "visionzip", "tokens": 11}), padded)


def test_defaults() -> None:
    """54 dominant with the class token, and 10 contextual."""
    params = library()["visionzip"].params
    assert (params["tokens"].default, params["contextual"].default) == (54 - 1 + 10, 10)
