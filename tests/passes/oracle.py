"""The brute-force side of the method tests: one sample at a time, no padding, a list of tokens, explicit softmax.

A method is a function that looks at a :class:`Scene` (the tokens behind an attention, and what that attention was) and
returns a :class:`Cut`: the tokens that are left. Nothing of tokcc is used to find it.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from fractions import Fraction
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from tests.lowering.harness import session_of
from tests.passes.reference_models import HEADS, WIDTH, Audio, Block, Text, Vision
from tokcc.analysis.context import Context
from tokcc.backends.onnx import build_onnx
from tokcc.ir.builder import EagerBuilder
from tokcc.ir.program import Program
from tokcc.testing import reduce_program, run_eager, run_program, trace

__all__ = [
    "Cut",
    "Feeds",
    "Method",
    "Model",
    "Result",
    "Scene",
    "at_output",
    "compare",
    "cosine",
    "drop",
    "inputs_of",
    "merge",
    "of_stage",
    "policy",
    "program_of",
    "received",
    "reference",
    "run_engine",
    "share_of",
    "top",
]

Model = Vision | Text | Audio
Feeds = Mapping[str, Tensor]


@dataclass
class Scene:
    """What a method may look at: one sample, after the attention of one layer.

    Attributes:
        layer: 0-based.
        depth: Number of layers.
        x: ``[N, C]``: the tokens.
        sizes: How many original tokens each stands for.
        probs: ``[H, N, N]`` of this layer.
        keys: ``[H, N, D]`` of this layer.
        rows: Attention rows of the class token in all layers up to this one, ``[H, N]`` each.
        initial: Number of tokens at the model's entry.
        values: ``[H, N, D]`` of this layer.
        queries: ``[H, N, D]`` of this layer.
        maps: The probabilities of all layers up to this one, ``[H, N, N]`` each.
    """

    layer: int
    depth: int
    x: Tensor
    sizes: Tensor
    probs: Tensor
    keys: Tensor
    rows: list[Tensor]
    initial: int
    values: Tensor
    queries: Tensor
    maps: list[Tensor]

    @property
    def n(self) -> int:
        """Number of tokens."""
        return len(self.x)


@dataclass
class Cut:
    """What is left.

    Attributes:
        kept: Positions of the tokens that stay, in output order; -1 for a new one.
        pairs: For merges: (source, destination) positions.
        x: The new tokens.
        sizes: Their sizes; None when the method does not count.
    """

    kept: list[int]
    x: Tensor
    pairs: list[tuple[int, int]] = field(default_factory=list)
    sizes: Tensor | None = None


Method = Callable[[Scene], Cut | None]


@dataclass
class Result:
    """One sample's result.

    Attributes:
        tokens: Reduced output ``[K, C]``.
        pooled: Class token output, where the model has one.
        cuts: The reductions, in order.
        lengths: Number of tokens after each.
        full: Output with all tokens: merged ones take the value of the token they joined, dropped ones keep the value
            they had when they were dropped.
    """

    tokens: Tensor
    pooled: Tensor | None
    cuts: list[Cut]
    full: Tensor

    @property
    def lengths(self) -> list[int]:
        return [len(cut.kept) for cut in self.cuts]


def _attention(block: Block, x: Tensor, sizes: Tensor | None) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Return the attended values before the residual, ``[N, C]``, the probabilities, queries, keys and values."""
    n, width = len(x), WIDTH // HEADS
    q, k, v = (part.reshape(n, HEADS, width).transpose(0, 1) for part in block.qkv(x).split(WIDTH, dim=1))
    logits = q @ k.transpose(1, 2) / width**0.5
    if sizes is not None:
        logits = logits + sizes.log()
    weights = logits.exp() / logits.exp().sum(-1, keepdim=True)
    return block.out((weights @ v).transpose(0, 1).reshape(n, WIDTH)), weights, q, k, v


def _restored(full: Tensor, places: list[list[int]], cut: Cut, x: Tensor) -> list[list[int]]:
    """Follow one cut: note what dropped tokens were, and return the original tokens behind each new one."""
    target = dict(cut.pairs)
    members = [list(places[i]) if i >= 0 else [] for i in cut.kept]
    for old, origin in enumerate(places):
        if old in target:
            members[cut.kept.index(target[old])] += origin
        elif old not in cut.kept:
            for place in origin:
                full[place] = x[old]
    return members


@torch.no_grad()
def reference(
    model: Model,
    feeds: Feeds,
    method: Method | None,
    *,
    layers: Sequence[int] = (),
    prop_attn: bool = True,
    at_end: bool = False,
) -> Result:
    """Run one sample without padding.

    Args:
        model: One of the reference models.
        feeds: Its input, batch size one.
        method: What to do.
        layers: Where.
        prop_attn: Merged keys count by their size.
        at_end: Cut at the output of the last block instead of after its attention.
    """
    names = [name for name in feeds if name != "mask"]
    x = model.embed(feeds[names[0]])[0]
    sizes = torch.ones(len(x))
    initial = len(x)
    cuts: list[Cut] = []
    rows: list[Tensor] = []
    maps: list[Tensor] = []
    full = torch.zeros_like(x)
    places = [[i] for i in range(initial)]

    def apply(layer: int, x: Tensor, heads: Sequence[Tensor]) -> tuple[Tensor, Tensor]:
        nonlocal places
        q, k, v = heads
        scene = Scene(layer, len(model.blocks), x, sizes, maps[-1], k, rows, initial, v, q, maps)
        cut = method(scene) if method else None
        if cut is None:
            return x, sizes
        cuts.append(cut)
        places = _restored(full, places, cut, x)
        return cut.x, torch.ones(len(cut.x)) if cut.sizes is None else cut.sizes

    for layer, block in enumerate(model.blocks):
        assert isinstance(block, Block)
        counts = sizes if prop_attn else None
        if block.norm_first:
            added, probs, *heads = _attention(block, block.norm1(x), counts)
            x = x + added
        else:
            added, probs, *heads = _attention(block, x, counts)
            x = block.norm1(x + added)
        rows.append(probs[:, 0])
        maps.append(probs)
        if layer in layers and not at_end:
            x, sizes = apply(layer, x, heads)
        if block.norm_first:
            x = x + block.down(F.gelu(block.up(block.norm2(x))))
        else:
            x = block.norm2(x + block.down(F.gelu(block.up(x))))
        if layer in layers and at_end:
            x, sizes = apply(layer, x, heads)
    for token, members in zip(x, places, strict=True):
        for place in members:
            full[place] = token
    y = model.norm(x)
    pooled: Tensor | None = None
    if isinstance(model, Vision):
        pooled = model.head(y[0])
    elif isinstance(model, Text) and model.pooler is not None:
        pooled = torch.tanh(model.pooler(y[0]))
    return Result(y, pooled, cuts, model.norm(full))


def at_output(model: Model, method: Method) -> Callable[[Feeds], Result]:
    """Return an oracle of a method at the very end: it sees normed tokens, and no norm follows what it makes."""

    def run(sample: Feeds) -> Result:
        found: list[Cut] = []

        def cut_there(scene: Scene) -> None:
            scene.x = model.norm(scene.x)
            cut = method(scene)
            assert cut is not None
            found.append(cut)

        result = reference(model, sample, cut_there, layers=[len(model.blocks) - 1], at_end=True)
        (cut,) = found
        full = result.full.clone()
        target = dict(cut.pairs)
        for old in range(len(full)):
            if target.get(old, old) in cut.kept:
                full[old] = cut.x[cut.kept.index(target.get(old, old))]
        return Result(cut.x, result.pooled, found, full)

    return run


# what methods are written with --------------------------------------------------------------------------------


def cosine(first: Tensor, second: Tensor) -> float:
    """Cosine of two vectors."""
    return float((first @ second) / (first.norm() * second.norm()))


def top(scores: Sequence[float], among: Sequence[int], count: int) -> list[int]:
    """Return the ``count`` positions of ``among`` with the largest score, best first; ties to the lower position."""
    return sorted(among, key=lambda i: (-float(scores[i]), i))[:count]


def share_of(n: int, share: str | float, rounding: str = "ceil") -> int:
    """Return a share of ``n``, computed with decimals as they are written."""
    exact = Fraction(str(share)) * n
    if rounding == "round":
        return math.floor(exact + Fraction(1, 2))
    return math.ceil(exact) if rounding == "ceil" else math.floor(exact)


def received(scene: Scene, *, diagonal: bool = True) -> list[float]:
    """Return the attention that each token receives, summed over heads and rows."""
    n, probs = scene.n, scene.probs.tolist()
    return [sum(head[i][j] for head in probs for i in range(n) if diagonal or i != j) for j in range(n)]


def merge(scene: Scene, kept: list[int], pairs: list[tuple[int, int]], *, sized: bool = True) -> Cut:
    """Average sources into destinations, weighted by size, one destination at a time."""
    weights = scene.sizes if sized else torch.ones(scene.n)
    merged, sizes = [], []
    for token in kept:
        group = [token, *(source for source, destination in pairs if destination == token)]
        total = sum(float(weights[i]) for i in group)
        merged.append(sum((weights[i] * scene.x[i] for i in group), torch.zeros(WIDTH)) / total)
        sizes.append(total)
    return Cut(kept, torch.stack(merged), pairs, torch.tensor(sizes) if sized else None)


def of_stage(tensors: Mapping[str, Tensor], stage: int) -> dict[str, Tensor]:
    """Return the trained tensors of one chosen layer, by their names within it."""
    prefix = f"stages.{stage}."
    return {name.removeprefix(prefix): t for name, t in tensors.items() if name.startswith(prefix)}


def drop(scene: Scene, kept: list[int]) -> Cut:
    """Keep some tokens as they are."""
    return Cut(kept, scene.x[kept])


# comparison with tokcc --------------------------------------------------------------------------------

# The keys are identities, so what they identify is kept.
_PROGRAMS: dict[Any, tuple[Model, Program]] = {}
_REDUCED: dict[Any, tuple[Program, Program]] = {}


def program_of(model: Model, feeds: Feeds, dynamic: Any = None) -> Program:
    """Trace a model for the shapes of ``feeds``; traced programs are not changed, so they are shared by the tests."""
    shapes = tuple((name, tuple(t.shape), t.dtype) for name, t in feeds.items())
    key = (id(model), shapes, repr(dynamic))
    if key not in _PROGRAMS:
        _PROGRAMS[key] = model, trace(model, feeds, dynamic)
    return _PROGRAMS[key][1]


def inputs_of(feeds: Feeds) -> list[dict[str, Tensor]]:
    """Split a batch into samples without padding."""
    batch = len(next(iter(feeds.values())))
    samples = [{name: t[i : i + 1] for name, t in feeds.items()} for i in range(batch)]
    if "mask" not in feeds:
        return samples
    tokens = feeds["mask"].shape[1]
    return [
        {
            name: t[:, : int(sample["mask"].sum())] if t.ndim == 2 and t.shape[1] == tokens else t
            for name, t in sample.items()
        }
        for sample in samples
    ]


def policy(step: Mapping[str, Any] | str, tokens: str = "reduced") -> dict[str, Any]:
    """Return a policy of one step, with the token output as it is after the reductions, or with all tokens."""
    step = {"preset": step} if isinstance(step, str) else dict(step)
    return {"version": 1, "steps": [step], "outputs": {"tokens": tokens}}


def _reduced(program: Program, wanted: Mapping[str, Any]) -> Program:
    key = (id(program), repr(wanted))
    if key not in _REDUCED:
        _REDUCED[key] = program, reduce_program(program, wanted)[0]
    return _REDUCED[key][1]


def run_engine(program: Program, feeds: Feeds) -> list[Tensor]:
    """Run a program in ONNX Runtime."""
    return session_of(build_onnx(program))(list(feeds.values()))


def compare(
    model: Model,
    feeds: Feeds,
    step: Mapping[str, Any] | str,
    oracle: Callable[[Feeds], Result],
    *,
    dynamic: Any = None,
    traced: Feeds | None = None,
    full: bool = False,
    engine: bool = False,
) -> list[Result]:
    """Check a preset against the oracle: outputs, kept tokens, pairs and sizes of every sample of a batch.

    Args:
        model: One of the reference models.
        feeds: A batch, rows of text possibly padded.
        step: The policy's step.
        oracle: Runs one sample.
        dynamic: Dynamic shapes of the export.
        traced: Inputs to export with, when not ``feeds``.
        full: Also check the output that has all its tokens back.
        engine: Also run the ONNX engine.
    """
    program = program_of(model, traced or feeds, dynamic)
    outputs = run_program(_reduced(program, policy(step)), feeds)
    eager, plan = run_eager(program, policy(step), feeds)
    wholes = run_program(_reduced(program, policy(step, "full")), feeds) if full else None
    results = [oracle(sample) for sample in inputs_of(feeds)]
    for mine, theirs in zip(outputs, eager, strict=True):
        torch.testing.assert_close(mine, theirs, rtol=0, atol=1e-5)
    if engine:
        found = run_engine(_reduced(program, policy(step)), feeds)
        for mine, theirs in zip(found, outputs, strict=True):
            torch.testing.assert_close(mine, theirs, rtol=0, atol=1e-4)
    for row, result in enumerate(results):
        _compare_cuts(plan.made, row, result)
        length = len(result.tokens)
        torch.testing.assert_close(outputs[0][row, :length], result.tokens, rtol=0, atol=1e-4)
        if result.pooled is not None:
            torch.testing.assert_close(outputs[1][row], result.pooled, rtol=0, atol=1e-4)
        if wholes is not None:
            torch.testing.assert_close(wholes[0][row, : len(result.full)], result.full, rtol=0, atol=1e-4)
    return results


def _compare_cuts(made: list[Any], row: int, result: Result) -> None:
    assert len(made) == len(result.cuts)
    before = None
    for space, cut in zip(made, result.cuts, strict=True):
        if space is before or not space.reduced:  # skipped, as it removes nothing
            assert cut.kept == list(range(space.size))
            assert not cut.pairs
            continue
        before = space
        index = space.index if space.index.ndim == 1 else space.index[row]
        length = len(cut.kept)
        if space.valid is not None:
            assert space.valid[row].tolist() == [True] * length + [False] * (len(index) - length)
        else:
            assert len(index) == length
        assert space.size == len(index)
        kept = index[:length].tolist()
        assert all(mine == theirs for mine, theirs in zip(kept, cut.kept, strict=True) if theirs >= 0)
        if cut.sizes is not None:
            torch.testing.assert_close(space.weight[row, :length], cut.sizes)
        if cut.pairs:
            assign = space.assign(Context(EagerBuilder())) if callable(space.assign) else space.assign
            # A padded parent has more tokens than the sample; nobody asks where its padding goes.
            groups = {old: kept[int(new)] for old, new in enumerate(assign[row].tolist()) if int(new) < length}
            mine = {(s, d) for s, d in groups.items() if s != d and s in {source for source, _ in cut.pairs}}
            assert mine == set(cut.pairs)
            assert all(groups[token] == token for token in cut.kept)
