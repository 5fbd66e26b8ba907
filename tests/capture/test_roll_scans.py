"""Scans over tokens, as traces have them, become one recurrence each and compute what they did."""

from __future__ import annotations

from typing import Any, Literal

import pytest
import torch
from torch import Tensor, nn

from tests.zoo.vim import Vim
from tokcc.capture.export import program_of
from tokcc.errors import CaptureError
from tokcc.ir.program import Program
from tokcc.testing import run_program, trace

# torch's own pytree copies a deprecated class in run_decompositions.
pytestmark = pytest.mark.filterwarnings(r"ignore:.isinstance\(treespec, LeafSpec\):FutureWarning")

RECURRENCE = torch.ops.tokcc.recurrence.default


def recurrences(program: Program) -> int:
    return sum(node.target is RECURRENCE for node in program.graph.nodes)


def check(model: nn.Module, feeds: dict[str, Tensor], count: int, dynamic: Any = None) -> Program:
    program = trace(model, feeds, dynamic)
    assert recurrences(program) == count
    with torch.no_grad():
        wanted = model(**feeds)
    wanted = list(wanted.values()) if isinstance(wanted, dict) else [wanted]
    for mine, theirs in zip(run_program(program, feeds), wanted, strict=True):
        torch.testing.assert_close(mine, theirs, rtol=0, atol=1e-5)
    return program


@pytest.mark.parametrize("form", ["loop", "scan", "scan_inside"])
def test_forms_of_a_selective_scan(form: Literal["loop", "scan", "scan_inside"]) -> None:
    model = Vim(side=12, depth=1, width=8, state=2, form=form, tokens_out=True)
    feeds = {"pixel_values": torch.randn(2, 3, 12, 12, generator=torch.Generator().manual_seed(0))}
    program = check(model, feeds, 2)
    # The same number of nodes for any number of tokens: nothing of the loop is left.
    assert len([n for n in program.graph.nodes if n.op == "call_function"]) < 100


class Loop(nn.Module):
    """``h = a h + b`` with what the subclass does around it."""

    def forward(self, a: Tensor, b: Tensor) -> Any:
        state, found = torch.zeros_like(b[:, 0]), []
        for t in self.order(b.shape[1]):
            state = self.step(a, b, state, t)
            found.append(self.read(state))
        return self.end(found, state)

    def order(self, count: int) -> Any:
        return range(count)

    def step(self, a: Tensor, b: Tensor, state: Tensor, t: int) -> Tensor:
        return b[:, t] + state * a[:, t]

    def read(self, state: Tensor) -> Tensor:
        return state.relu()

    def end(self, found: list[Tensor], state: Tensor) -> Any:
        return torch.stack(found, dim=1)


class Backwards(Loop):
    """From behind."""

    def order(self, count: int) -> Any:
        return range(count - 1, -1, -1)


class Computed(Loop):
    """Decay and update are computed in each step, from a decay that is the same in all of them."""

    def step(self, a: Tensor, b: Tensor, state: Tensor, t: int) -> Tensor:
        return torch.exp(-a[:, 0] * a[:, 0]) * state + (b[:, t].unsqueeze(-1) * 2).squeeze(-1) * a[:, t].sigmoid()


class KeepsLast(Loop):
    """The last state leaves too, as for a cache."""

    def end(self, found: list[Tensor], state: Tensor) -> Any:
        return {"found": torch.stack(found, dim=-1), "state": state}


@pytest.mark.parametrize("kind", [Loop, Backwards, Computed, KeepsLast])
@pytest.mark.parametrize("dynamic", [False, True])
def test_loops(kind: type[Loop], dynamic: bool) -> None:
    generator = torch.Generator().manual_seed(0)
    feeds = {name: torch.randn(3, 5, 4, generator=generator) for name in "ab"}
    shapes = {name: {0: torch.export.Dim("batch", min=1, max=9)} for name in "ab"} if dynamic else None
    check(kind(), feeds, 1, shapes)


class OverAll(Loop):
    """Each step is read as a whole."""

    def read(self, state: Tensor) -> Tensor:
        return state.amax() + state.sum(dim=()) + torch.mean(state, dim=None)

    def end(self, found: list[Tensor], state: Tensor) -> Any:
        return torch.stack(found)


class OverSamples(Loop):
    """The first five samples are the steps."""

    def forward(self, a: Tensor, b: Tensor) -> Any:
        state, found = torch.zeros_like(b[0]), []
        for t in range(5):
            state = a[t] * state + b[t]
            found.append(state)
        return torch.stack(found)


def test_a_step_read_as_a_whole() -> None:
    check(OverAll(), {name: torch.randn(3, 5, 4) for name in "ab"}, 1)


def test_a_size_that_only_the_example_shares_with_the_steps() -> None:
    shapes = {name: {0: torch.export.Dim("batch", min=5, max=9)} for name in "ab"}
    program = check(OverSamples(), {name: torch.randn(5, 3, 4) for name in "ab"}, 0, shapes)
    feeds = {name: torch.randn(8, 3, 4) for name in "ab"}
    (got,) = run_program(program, feeds)
    torch.testing.assert_close(got, OverSamples()(**feeds))


class WideState(Loop):
    """The state has more digits than what is added to it."""

    def forward(self, a: Tensor, b: Tensor) -> Any:
        state, found = torch.zeros_like(b[:, 0], dtype=torch.float64), []
        for t in range(b.shape[1]):
            state = a[:, t] * state + b[:, t]
            found.append(state)
        return torch.stack(found, dim=1)


@pytest.mark.parametrize(("decay", "update"), [("float32", "float16"), ("float16", "float32"), ("float16", "float16")])
def test_a_state_keeps_its_type(decay: str, update: str) -> None:
    feeds = {
        "a": torch.rand(3, 5, 4).to(getattr(torch, decay)),
        "b": torch.randn(3, 5, 4).to(getattr(torch, update)),
    }
    check(WideState(), feeds, 1)


class Squares(Loop):
    """No linear recurrence."""

    def step(self, a: Tensor, b: Tensor, state: Tensor, t: int) -> Tensor:
        return b[:, t] + state * state


class Shifted(Loop):
    """Steps that are not alike: each reads the token before it."""

    def step(self, a: Tensor, b: Tensor, state: Tensor, t: int) -> Tensor:
        return b[:, max(t - 1, 0)] + state * a[:, t]


@pytest.mark.parametrize("kind", [Squares, Shifted])
def test_other_loops_stay_as_they_are(kind: type[Loop]) -> None:
    generator = torch.Generator().manual_seed(0)
    check(kind(), {name: torch.randn(3, 5, 4, generator=generator) for name in "ab"}, 0)


class NotLinear(nn.Module):
    """torch's scan with another body."""

    def forward(self, a: Tensor) -> Tensor:
        from torch._higher_order_ops.scan import scan

        def step(state: Tensor, now: Tensor) -> tuple[Tensor, Tensor]:
            state = torch.tanh(state + now)
            return state, state.clone()

        return scan(step, torch.zeros_like(a[0]), a)[1]  # type: ignore[no-any-return]  # torch's scan has no types


class SameInEachStep(nn.Module):
    """torch's scan whose body computes the decay from a parameter, as wide as there are steps."""

    def __init__(self) -> None:
        super().__init__()
        self.rate = nn.Parameter(torch.randn(5, 4, generator=torch.Generator().manual_seed(0)))

    def forward(self, a: Tensor, b: Tensor) -> Tensor:
        from torch._higher_order_ops.scan import scan

        def step(state: Tensor, now: tuple[Tensor, Tensor]) -> tuple[Tensor, Tensor]:
            state = torch.exp(-self.rate.exp() * now[0]) * state + now[1]
            return state, state.clone()

        return scan(step, torch.zeros_like(b[0]), (a, b))[1]  # type: ignore[no-any-return]  # torch's scan has no types


@pytest.mark.parametrize("steps", [5, 7])
def test_what_a_body_computes_anew_in_each_step(steps: int) -> None:
    check(SameInEachStep(), {name: torch.rand(steps, 5, 4) for name in "ab"}, 1)


def test_other_scans_are_refused() -> None:
    exported = torch.export.export(NotLinear(), (torch.randn(5, 3),), strict=False).run_decompositions({})
    with pytest.raises(CaptureError, match="not a linear recurrence") as caught:
        program_of(exported)
    assert caught.value.help
    assert "decay * state + update" in str(caught.value)


@pytest.mark.parametrize("length", [6, 9])
def test_mamba_of_transformers(length: int) -> None:
    """Its path for traces is a loop over the tokens."""
    from transformers import MambaConfig, MambaModel

    class Text(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            torch.manual_seed(0)
            self.model = MambaModel(MambaConfig(vocab_size=50, hidden_size=16, state_size=4, num_hidden_layers=2))

        def forward(self, input_ids: Tensor) -> Tensor:
            return self.model(input_ids=input_ids, use_cache=False).last_hidden_state  # type: ignore[no-any-return]

    check(Text().eval(), {"input_ids": torch.randint(0, 50, (2, length))}, 2)
