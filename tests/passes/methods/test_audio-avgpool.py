"""Frame average pooling before the final norm (Qwen2-Audio, arXiv:2407.10759)."""

from __future__ import annotations

import copy
from collections.abc import Callable

import pytest
import torch
from torch.export import Dim

from tests.passes.oracle import Cut, Feeds, Result, Scene, compare, policy, program_of, reference
from tests.passes.reference_models import audio, frames, sentences, text
from tokcc.errors import AxisError
from tokcc.testing import reduce_program, run_eager, run_program


def pooled(scene: Scene, stride: int) -> Cut:
    groups = [range(start, start + stride) for start in range(0, scene.n - stride + 1, stride)]
    return Cut([g[0] for g in groups], torch.stack([sum(scene.x[i] for i in g) / stride for g in groups]))  # type: ignore[misc]


def oracle(stride: int, depth: int = 4) -> Callable[[Feeds], Result]:
    def run(sample: Feeds) -> Result:
        return reference(audio(depth), sample, lambda scene: pooled(scene, stride), layers=[depth - 1], at_end=True)

    return run


@pytest.mark.parametrize(("tokens", "stride", "groups"), [(30, 2, 15), (31, 2, 15), (31, 4, 7), (9, 9, 1)])
def test_audio(tokens: int, stride: int, groups: int) -> None:
    step = {"preset": "audio-avgpool", "stride": stride}
    results = compare(audio(), {"frames": frames(3, tokens)}, step, oracle(stride))
    assert results[0].lengths == [groups]


def test_stride_one_is_the_model_itself() -> None:
    feeds = {"frames": frames(2, 31)}
    program = program_of(audio(), feeds)
    reduced, plan = reduce_program(program, {"version": 1, "steps": [{"preset": "audio-avgpool", "stride": 1}]})
    assert plan.reductions == ()
    torch.testing.assert_close(run_program(reduced, feeds)[0], run_program(program, feeds)[0], rtol=0, atol=0)


def test_all_frames_get_the_value_of_their_group() -> None:
    """With a full output the last frame, of no whole group, is given the last group."""
    feeds = {"frames": frames(2, 31)}
    program = program_of(audio(), feeds)
    short, group = run_program(reduce_program(program, "audio-avgpool")[0], feeds)
    (full,) = run_program(reduce_program(program, policy("audio-avgpool", "full"))[0], feeds)
    expected = [min(i // 2, 14) for i in range(31)]
    assert group.tolist() == [expected] * 2
    torch.testing.assert_close(full, short[:, expected], rtol=0, atol=1e-5)


def test_equal_frames_are_unchanged() -> None:
    """Copies side by side: pooling them changes nothing."""
    model = copy.deepcopy(audio())
    model.positions.data.zero_()
    feeds = {"frames": frames(2, 8).repeat_interleave(2, dim=1)}
    program = program_of(model, feeds)
    short, _ = run_program(reduce_program(program, "audio-avgpool")[0], feeds)
    torch.testing.assert_close(short, run_program(program, feeds)[0][:, ::2], rtol=0, atol=1e-5)


def test_dynamic_number_of_frames() -> None:
    shapes = {"frames": {0: Dim("batch", min=1, max=9), 1: Dim("sequence", min=4, max=60)}}
    for tokens in (25, 8):
        compare(
            audio(2),
            {"frames": frames(3, tokens)},
            "audio-avgpool",
            oracle(2, 2),
            dynamic=shapes,
            traced={"frames": frames(2, 16)},
        )


def test_padding_is_refused() -> None:
    feeds = sentences([20, 12])
    with pytest.raises(AxisError, match="padding"):
        run_eager(program_of(text(pooled=False), feeds), policy("audio-avgpool"), feeds)


def test_a_budget_that_names_no_group_is_refused() -> None:
    feeds = {"frames": frames(2, 31)}
    step = {"preset": "audio-avgpool", "budget": {"keep": 0.4}}
    with pytest.raises(AxisError, match="how many neighbours") as caught:
        run_eager(program_of(audio(), feeds), policy(step), feeds)
    assert "stride" in (caught.value.help or "")


def test_fewer_frames_than_a_group() -> None:
    feeds = {"frames": frames(2, 5)}
    step = {"preset": "audio-avgpool", "stride": 6}
    with pytest.raises(AxisError, match="do not fill one group"):
        run_eager(program_of(audio(), feeds), policy(step), feeds)
