"""ZOO-Prune (arXiv:2509.24837) against finite differences in float64 and a NumPy greedy."""

from __future__ import annotations

import copy

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from tests.passes.oracle import Cut, Method, Scene, at_output, compare, drop, inputs_of, policy, program_of, reference
from tests.passes.reference_models import WIDTH, Vision, audio, frames, patches, sentences, text, vision
from tests.passes.test_pieces import make_cut
from tokcc.errors import AxisError
from tokcc.passes.scores.sensitivity import Sensitivity
from tokcc.testing import reduce_program, run_eager, run_program, trace


class Projected(nn.Module):
    """An image encoder as a language model reads it: the last block's patches, projected."""

    def __init__(self) -> None:
        super().__init__()
        self.encoder: Vision = copy.deepcopy(vision())
        generator = torch.Generator().manual_seed(7)
        self.up, self.down = nn.Linear(WIDTH, 48), nn.Linear(48, 40)
        with torch.no_grad():
            for parameter in (*self.up.parameters(), *self.down.parameters()):
                parameter.copy_(0.3 * torch.randn(parameter.shape, generator=generator))

    def project(self, x: Tensor) -> Tensor:
        projected: Tensor = self.down(F.gelu(self.up(x)))
        return projected

    def forward(self, patches: Tensor) -> dict[str, Tensor]:
        x = self.encoder.embed(patches)
        for block in self.encoder.blocks:
            x = block(x)
        return {"tokens": self.project(x[:, 1:])}


def picked(x: Tensor, follows: nn.Module, count: int, directions: int = 16) -> list[int]:
    """``x``: ``[M, C]`` in front of what follows; ``follows`` runs in float64."""
    unit = F.normalize(torch.randn(directions, WIDTH, generator=torch.Generator().manual_seed(0)), dim=1).double()
    x = x.double()
    h = 0.01 * float((x * x).mean()) ** 0.5
    s = np.array(
        [np.mean([float((follows(t + h * u) - follows(t - h * u)).norm()) / (2 * h) for u in unit]) for t in x]
    )
    z = F.normalize(follows(x), dim=1).numpy()
    chosen = [int(s.argmax())]
    while len(chosen) < count:
        value = s * (1 - (z @ z[chosen].T).max(axis=1))
        value[chosen] = -np.inf
        chosen.append(int(value.argmax()))
    return sorted(chosen)


class Function(nn.Module):
    def __init__(self, module: nn.Module) -> None:
        super().__init__()
        self.module = copy.deepcopy(module).double()

    @torch.no_grad()
    def forward(self, x: Tensor) -> Tensor:
        made: Tensor = self.module.project(x) if isinstance(self.module, Projected) else self.module(x)
        return made


def zoo_prune(norm: nn.Module, count: int, protected: int) -> Method:
    def method(scene: Scene) -> Cut | None:
        chosen = picked(scene.x[protected:], Function(norm), count)
        return drop(scene, [*range(protected), *(i + protected for i in chosen)])

    return method


def test_final_norm() -> None:
    """What follows the last block of this encoder is its norm."""
    step = {"preset": "zoo-prune", "tokens": 9}
    compare(
        vision(),
        {"patches": patches(3, 50)},
        step,
        lambda sample: reference(vision(), sample, zoo_prune(vision().norm, 9, 1), layers=(3,), at_end=True),
        full=True,
        engine=True,
    )


def test_without_a_class_token() -> None:
    compare(
        audio(),
        {"frames": frames(2, 31)},
        {"preset": "zoo-prune", "tokens": 7},
        lambda sample: reference(audio(), sample, zoo_prune(audio().norm, 7, 0), layers=(3,), at_end=True),
    )


@torch.no_grad()
def test_projector_behind_the_class_token() -> None:
    """The class token is cut off between the cut and the projector; other sizes of change and directions."""
    model, feeds = Projected().eval(), {"patches": patches(2, 38)}
    reduced, plan = reduce_program(trace(model, feeds), policy({"preset": "zoo-prune", "tokens": 10, "directions": 5}))
    tokens = run_program(reduced, feeds)[0]
    for row, sample in enumerate(inputs_of(feeds)):
        found: list[Tensor] = []
        reference(model.encoder, sample, lambda scene, to=found: to.append(scene.x[1:]), layers=(3,), at_end=True)
        chosen = picked(found[0], Function(model), 10, 5)
        torch.testing.assert_close(tokens[row], model.project(found[0][chosen]), rtol=0, atol=1e-4)
    assert plan.reductions[0].site == "block_output"


def test_a_linear_function_has_one_sensitivity() -> None:
    """It is the mean of ``|W u|`` for every token."""
    weight = torch.randn(8, 12, generator=torch.Generator().manual_seed(1))
    score = Sensitivity(directions=20).emit(make_cut(5, ahead=lambda x, places: x @ weight))
    unit = F.normalize(torch.randn(20, 8, generator=torch.Generator().manual_seed(0)), dim=1)
    torch.testing.assert_close(score, (unit @ weight).norm(dim=1).mean().expand(2, 15), rtol=1e-3, atol=0)


def test_the_gain_of_a_token_decides() -> None:
    gain = torch.arange(1.0, 15.0)
    score = Sensitivity().emit(make_cut(5, first=1, ahead=lambda x, places: x * gain[places][:, None]))
    assert score[:, 1:].argsort(1).tolist() == [list(range(14))] * 2


def test_where_nothing_follows_all_are_alike() -> None:
    """Then it is farthest-point selection from the first token."""

    def method(scene: Scene) -> Cut | None:
        z = F.normalize(scene.x, dim=1).double().numpy()
        chosen = [0]
        while len(chosen) < 6:
            nearest = (z @ z[chosen].T).max(axis=1)
            nearest[chosen] = np.inf
            chosen.append(int(nearest.argmin()))
        return drop(scene, sorted(chosen))

    step = {"preset": "zoo-prune", "tokens": 6, "at": {"site": "encoder_output"}}
    compare(audio(), {"frames": frames(2, 31)}, step, at_output(audio(), method))


@pytest.mark.parametrize(
    ("layer", "message"), [(1, "cannot be said before layer 2"), (-1, "padding has no sensitivity")]
)
def test_refusals(layer: int, message: str) -> None:
    feeds = {"patches": patches(1, 50)} if layer == 1 else sentences([20, 12])
    model = vision() if layer == 1 else text()
    step = {"preset": "zoo-prune", "tokens": 6, "at": {"layers": [layer]}}
    with pytest.raises(AxisError, match=message):
        run_eager(program_of(model, feeds), policy(step), feeds)
