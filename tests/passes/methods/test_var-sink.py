"""VAR's sink test (arXiv:2503.03321) against its formula, token by token."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from tests.passes.guided import choosing
from tests.passes.oracle import Feeds, Scene, compare, policy, program_of, share_of, top
from tests.passes.reference_models import WIDTH, frames, patches, sentences, text, vision
from tests.passes.reference_models import audio as audio_model
from tokcc.errors import AxisError
from tokcc.testing import run_eager


def phi(token: Tensor, channels: list[int] | None) -> float:
    size = (sum(float(value) ** 2 for value in token) / len(token) + 1e-6) ** 0.5
    return max(abs(float(token[c])) / size for c in (channels or range(len(token))))


@pytest.mark.parametrize("channels", [None, [5], [3, 20, 31]])
def test_images(channels: list[int] | None) -> None:
    def choose(z: Tensor, scene: Scene, sample: Feeds) -> list[int]:
        del scene, sample
        return top([-phi(token, channels) for token in z], range(len(z)), share_of(len(z), 0.7, "round"))

    step = {"preset": "var-sink", "keep": 0.7, "channels": channels}
    compare(vision(), {"patches": patches(3, 50)}, step, choosing(vision(), 1, choose), engine=True)


def test_padded_rows_are_what_they_are_alone() -> None:
    def choose(z: Tensor, scene: Scene, sample: Feeds) -> list[int]:
        del scene, sample
        return top([-phi(token, None) for token in z], range(len(z)), share_of(len(z), 0.9, "round"))

    compare(text(), sentences([20, 12, 5]), "var-sink", choosing(text(), 1, choose))


def test_a_sink_goes() -> None:
    """A token with one massive channel is the one that is dropped."""

    class Spiked(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.inner = audio_model()
            spike = torch.zeros(30, WIDTH)
            spike[11, 6] = 400.0
            self.register_buffer("spike", spike)

        def forward(self, frames: Tensor) -> dict[str, Tensor]:
            x = self.inner.embed(frames)
            for block in self.inner.blocks:
                x = block(x)
            return {"tokens": x + self.spike}

    feeds = {"frames": frames(2, 30)}
    step = {"preset": "var-sink", "channels": [6], "budget": {"remove": 1}}
    _, plan = run_eager(program_of(Spiked().eval(), feeds), policy(step), feeds)  # type: ignore[arg-type]
    assert plan.made[0].index.tolist() == [[i for i in range(30) if i != 11]] * 2


def test_a_channel_that_is_not_there() -> None:
    feeds = {"patches": patches(1, 17)}
    with pytest.raises(AxisError, match="no channel 1415"):
        run_eager(program_of(vision(), feeds), policy({"preset": "var-sink", "channels": [1415, 2533]}), feeds)
