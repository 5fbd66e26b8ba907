"""Inputs to check engines with: the examples, and random ones of other shapes."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch

from tokcc.analysis.sizes import number
from tokcc.ir.program import Program

__all__ = ["Feeds", "example_feeds", "make_feeds"]

Feeds = dict[str, torch.Tensor]


def example_feeds(program: Program, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> Feeds:
    """Return the example inputs by name, in order."""
    from torch.utils import _pytree as pytree

    leaves = [leaf for leaf in pytree.tree_leaves((args, dict(kwargs))) if isinstance(leaf, torch.Tensor)]
    nodes = [n for n in program.user_inputs if isinstance(n.meta.get("val"), torch.Tensor)]
    return {program.public_name(node): leaf.detach() for node, leaf in zip(nodes, leaves, strict=True)}


def make_feeds(program: Program, example: Feeds, *, seed: int = 0, variants: int = 3) -> list[Feeds]:
    """Return several inputs: the example, and random ones at other batch sizes and lengths where those are dynamic.

    Integer inputs stay within the values of the example; inputs of zeros and ones become right-padded masks.

    Args:
        program: The program.
        example: The example inputs.
        seed: Of the random values.
        variants: How many random inputs.
    """
    generator = torch.Generator().manual_seed(seed)
    bindings = program.bindings({name: tuple(value.shape) for name, value in example.items()})
    ranges = program.ranges()
    result = [example]
    for variant in range(variants):
        sizes = {
            symbol: _varied(value, ranges[symbol], variant) for symbol, value in bindings.items() if symbol in ranges
        }
        result.append(_random(program, example, {**bindings, **sizes}, generator))
    return result


def _varied(value: int, allowed: tuple[int, int | None], number: int) -> int:
    low, high = allowed
    wanted = max((1, value + 1, (2 * value) // 3)[number % 3], low, 1)
    return wanted if high is None else min(wanted, high)


def _random(program: Program, example: Feeds, sizes: Mapping[Any, int], generator: torch.Generator) -> Feeds:
    feeds: Feeds = {}
    for node in program.user_inputs:
        name = program.public_name(node)
        if name not in example:
            continue
        fake, known = node.meta["val"], example[name]
        shape = [number(size, sizes) for size in fake.shape]
        feeds[name] = _tensor(shape, known, generator)
    return feeds


def _tensor(shape: list[int], known: torch.Tensor, generator: torch.Generator) -> torch.Tensor:
    if known.is_floating_point():
        return torch.randn(shape, generator=generator).to(known.dtype)
    low, high = (int(known.min()), int(known.max())) if known.numel() else (0, 1)
    if known.dtype == torch.bool or (low >= 0 and high <= 1):
        return _mask(shape, known, generator)
    return torch.randint(low, high + 1, shape, generator=generator).to(known.dtype)


def _mask(shape: list[int], known: torch.Tensor, generator: torch.Generator) -> torch.Tensor:
    """A right-padded mask like the example: the first row full, the others of random length, at least half."""
    if len(shape) != 2 or not bool(known.any()) or (known.dtype == torch.bool and bool(known.all())):
        return known.flatten()[:1].expand(shape).clone() if known.numel() else torch.zeros(shape, dtype=known.dtype)
    batch, length = shape
    # Where zeros mark real tokens (a key_padding_mask), the first column of the example is zero.
    real = bool(known[:, 0].any())
    lengths = torch.randint((length + 1) // 2, length + 1, (batch,), generator=generator)
    lengths[0] = length
    keep = torch.arange(length)[None, :] < lengths[:, None]
    return (keep if real else ~keep).to(known.dtype)
