"""Reduce, then bring the new tokens to another width by a trained MLP."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, ClassVar, get_args

import torch
from pydantic import ValidationInfo, field_validator

from tokcc.errors import PolicyError
from tokcc.ir.space import TokenSpace
from tokcc.passes.cut import Chosen, Cut
from tokcc.passes.piece import OtherReducer, Reducer
from tokcc.passes.trained import Activation, TensorSpec, Trained, activated, linear_specs, mlp_specs

__all__ = ["Projected"]


class Projected(Trained, Reducer):
    """A projector: what another reducer makes goes token by token through an MLP.

    Gated it is ``W3 (act(W1 x) * W2 x)`` (SwiGLU in TokenFLEX, arXiv:2504.03154) with ``projector.gate.weight``
    ``[hidden, C]``, ``projector.up.weight`` ``[hidden, C]`` and ``projector.down.weight`` ``[D, hidden]``; plain it is
    ``W2 act(W1 x)`` with ``projector.0.weight`` ``[hidden, C]`` and ``projector.1.weight`` ``[D, hidden]``; with biases
    where there are any. D may differ from C where nothing follows that counts on C. There can be no protected tokens,
    whose width would be left as it was.

    Attributes:
        of: The reducer.
        gated: Which of the two.
        activation: act.
    """

    kind: ClassVar[str] = "projected"
    takes: ClassVar[tuple[type, ...]] = get_args(Chosen)
    always: ClassVar[bool] = True

    of: OtherReducer
    gated: bool = True
    activation: Activation = "silu"

    @field_validator("of")
    @classmethod
    def _makes_tokens(cls, of: Reducer, info: ValidationInfo) -> Reducer:
        if of.marks or of.bypasses or isinstance(of, Projected):
            raise PolicyError(
                f"`{of.kind}` makes no tokens of the model's width, which `projected` goes on with",
                policy=(info.context or {}).get("where", ""),
                help="name a reducer that makes fewer tokens, such as `of: {kind: adaptive_pool}`",
            )
        return of

    def tensors(self, sizes: Mapping[str, int]) -> Sequence[TensorSpec]:
        """See :class:`Projected`."""
        del sizes
        if not self.gated:
            return mlp_specs("projector", ["C", "projector_width", "D"])
        return [
            *linear_specs("projector.gate", "projector_width", "C"),
            *linear_specs("projector.up", "projector_width", "C"),
            *linear_specs("projector.down", "D", "projector_width"),
        ]

    def reduce(self, cut: Cut, chosen: Chosen, child: TokenSpace) -> Any:
        """See :class:`Projected`."""
        b = cut.b
        if not isinstance(chosen, self.of.takes):
            cut.ctx.fail(
                f"`{self.of.kind}` cannot take what is selected",
                help="use a selector that goes with it: `tokcc presets --show NAME` has examples",
            )
        if cut.first or cut.last:
            cut.ctx.fail(
                "protected tokens would not go through the projector, and have no place beside what it makes",
                help="use `protect: {first: 0}`, and a model that gives its patches without the class token",
            )
        x = b.cast(self.of.reduce(cut, chosen, child), torch.float32)
        if not self.gated:
            y = self.mlp(b, x, "projector", 2, self.activation)
        else:
            gate = activated(b, self.linear(b, x, "projector.gate"), self.activation)
            y = self.linear(b, b.mul(gate, self.linear(b, x, "projector.up")), "projector.down")
        return b.cast(y, b.dtype(cut.x))
