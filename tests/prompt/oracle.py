"""An oracle for prompts that get shorter between layers: transformers' own model, eager, without any cache.

All tokens of a row, prompt and continuation, are run at once. Behind a cut a 4-D mask hides the keys of the tokens that
are gone; nothing is gathered and nothing is remembered. What a row gives that runs alone is what it has to give in a
padded batch, call after call.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from transformers import DynamicCache

__all__ = ["Cut", "Seen", "Trace", "next_layer", "projected", "read_alone", "run"]


@dataclass
class Seen:
    """What a rule sees at its cut; all of one row, of the prompt alone, no batch axis.

    Attributes:
        model: The model.
        layer: The layer in front of the cut.
        ids: int64 ``[N]``.
        alive: Tokens that are still there, ascending.
        hidden: ``[N, C]``: what leaves the layer.
        probs: By layer up to this one, ``[H, N, N]``.
        branches: By layer and kind, ``attention`` or ``mlp``: what goes in and what comes out, ``[N, C]``.
        activations: By layer: what the last projection of its MLP reads, ``[N, F]``.
        embedded: ``[N, C]``: what the first layer reads.
        turned: Cosines and sines of the positions that the next layer would see, ``[N, D]``.
        memory: Carried from cut to cut.
    """

    model: nn.Module
    layer: int
    ids: Tensor
    alive: list[int]
    hidden: Tensor
    probs: dict[int, Tensor]
    branches: dict[tuple[int, str], tuple[Tensor, Tensor]]
    activations: dict[int, Tensor]
    embedded: Tensor
    turned: tuple[Tensor, Tensor]
    memory: dict[str, Any]

    def visual(self, image: int) -> list[int]:
        """Tokens of the image that are still there."""
        return [j for j in self.alive if int(self.ids[j]) == image]


Rule = Callable[[Seen], list[int]]
"""Returns the tokens that stay, ascending."""


@dataclass(frozen=True)
class Cut:
    """A cut behind a layer."""

    layer: int
    rule: Rule


@dataclass
class Trace:
    """What one row gave.

    Attributes:
        logits: ``[T, V]``; of a token that is gone, what the head makes of what it was when it went.
        alive: Tokens of the prompt behind each cut.
    """

    logits: Tensor
    alive: list[list[int]] = field(default_factory=list)


def run(model: nn.Module, ids: Tensor, prompt: int, cuts: Sequence[Cut], *, compact: bool = False) -> Trace:
    """Run a row of ids ``[T]`` whose first ``prompt`` tokens are the prompt.

    Args:
        model: With eager attention.
        ids: The row.
        prompt: N.
        cuts: Ascending.
        compact: Behind a cut, positions are counted anew.
    """
    total, base = len(ids), model.model
    alive, left, memory = list(range(prompt)), list(cuts), {}
    probs: dict[int, Tensor] = {}
    branches: dict[tuple[int, str], tuple[Tensor, Tensor]] = {}
    activations: dict[int, Tensor] = {}
    went: dict[int, Tensor] = {}
    trace = Trace(torch.empty(0))
    first: list[Tensor] = []

    def places() -> Tensor:
        if not compact:
            return torch.arange(total)
        seen = [j in set(alive) or j >= prompt for j in range(total)]
        return (torch.tensor(seen).long().cumsum(0) - 1).clamp(min=0)

    def before(module: nn.Module, args: Any, kwargs: Any) -> Any:
        if not first:
            first.append(args[0][0])
        if len(alive) == prompt:
            return None
        slot = torch.arange(total)
        hidden = torch.ones(total, dtype=torch.bool)
        hidden[alive] = False
        hidden[prompt:] = False
        seen = (slot <= slot[:, None]) & ~hidden | (slot == slot[:, None])
        mask = torch.zeros(seen.shape).masked_fill(~seen, torch.finfo(torch.float32).min)
        changed = {**kwargs, "attention_mask": mask[None, None]}
        if compact:
            changed["position_ids"] = places()[None]
            changed["position_embeddings"] = base.rotary_emb(args[0], places()[None])
        return args, changed

    def after(module: nn.Module, args: Any, output: Any) -> None:
        nonlocal alive
        layer = next(i for i, m in enumerate(base.layers) if m is module)
        hidden = (output if isinstance(output, Tensor) else output[0])[0]
        if not left or left[0].layer != layer:
            return
        cos, sin = base.rotary_emb(hidden[None], places()[None])
        short = {kind: (a[:prompt], b[:prompt]) for kind, (a, b) in branches.items()}
        rows = {index: table[:prompt] for index, table in activations.items()}
        tables = {index: table[:, :prompt, :prompt] for index, table in probs.items()}
        seen = Seen(
            model, layer, ids[:prompt], alive, hidden[:prompt], tables, short, rows, first[0][:prompt],
            (cos[0, :prompt], sin[0, :prompt]), memory,
        )  # fmt: skip
        kept = left.pop(0).rule(seen)
        assert kept == sorted(kept)
        assert set(kept) <= set(alive)
        went.update({j: hidden[j] for j in alive if j not in set(kept)})
        alive = kept
        trace.alive.append(kept)

    def watch(layer: int, kind: str) -> Any:
        def hook(module: nn.Module, args: Any, kwargs: Any, output: Any) -> None:
            given = args[0] if args else kwargs["hidden_states"]
            made = output if isinstance(output, Tensor) else output[0]
            branches[layer, kind] = (given[0], made[0])
            if kind == "attention":
                probs[layer] = output[1][0].float()

        return hook

    hooks = []
    for layer, module in enumerate(base.layers):
        hooks.append(module.register_forward_pre_hook(before, with_kwargs=True))
        hooks.append(module.register_forward_hook(after))
        hooks.append(module.self_attn.register_forward_hook(watch(layer, "attention"), with_kwargs=True))
        hooks.append(module.mlp.register_forward_hook(watch(layer, "mlp"), with_kwargs=True))

        def keep(module: nn.Module, args: Any, layer: int = layer) -> None:
            activations[layer] = args[0][0]

        hooks.append(module.mlp.down_proj.register_forward_pre_hook(keep))
    try:
        with torch.no_grad():
            out = model(input_ids=ids[None], use_cache=False, output_attentions=True)
            trace.logits = out.logits[0].clone()
            for j, hidden in went.items():
                trace.logits[j] = model.lm_head(base.norm(hidden))
    finally:
        for hook in hooks:
            hook.remove()
    assert not left
    return trace


@dataclass
class Stream:
    """What a rule sees that puts other tokens in the place of some: one row, the prompt alone.

    Attributes:
        model: The model.
        layer: The layer in front of the cut.
        tags: For each token its place in the prompt; tokens of the image are in `image`.
        image: Which of them are tokens of the image, or were made of some.
        hidden: ``[N, C]``.
        probs: ``[H, N, N]`` of the layer.
        embedded: ``[N0, C]``: what the first layer reads, of the whole prompt.
        memory: Carried from cut to cut.
    """

    model: nn.Module
    layer: int
    tags: list[int]
    image: list[bool]
    hidden: Tensor
    probs: Tensor
    embedded: Tensor
    memory: dict[str, Any]

    @property
    def turned(self) -> tuple[Tensor, Tensor]:
        """Cosines and sines of places counted anew."""
        cos, sin = self.model.model.rotary_emb(self.hidden[None], torch.arange(len(self.hidden))[None])
        return cos[0], sin[0]


Rebuilding = Callable[[Stream], tuple[list[int], list[tuple[int, Tensor]]]]
"""Returns the tokens that stay (numbers in the stream), and new ones: a token that goes and what takes its place."""


def run_rebuilt(
    model: nn.Module, ids: Tensor, prompt: int, image: int, cuts: Sequence[tuple[int, Rebuilding]]
) -> Trace:
    """Run a row whose stream is made anew behind each cut; positions are counted anew.

    New tokens stand behind the place where the last token of the image was. Logits of tokens that stand for others are
    not a number.
    """
    base, rules = model.model, dict(cuts)
    tags, total = list(range(prompt)), len(ids)
    kinds = [int(ids[j]) == image for j in range(prompt)]
    memory: dict[str, Any] = {}
    trace = Trace(torch.full([total, model.config.vocab_size], float("nan")))
    with torch.no_grad():
        hidden = base.embed_tokens(ids[None])
        embedded = hidden[0, :prompt]
        for layer, module in enumerate(base.layers):
            length = hidden.shape[1]
            slot = torch.arange(length)
            mask = torch.zeros(length, length).masked_fill(slot > slot[:, None], torch.finfo(torch.float32).min)
            place = slot[None]
            seen: list[Tensor] = []
            hook = module.self_attn.register_forward_hook(lambda m, a, out, seen=seen: seen.append(out[1][0]))
            out = module(
                hidden,
                attention_mask=mask[None, None],
                position_ids=place,
                position_embeddings=base.rotary_emb(hidden, place),
            )
            hook.remove()
            hidden = out if isinstance(out, Tensor) else out[0]
            if layer not in rules:
                continue
            own = len(tags)
            stream = Stream(model, layer, tags, kinds, hidden[0, :own], seen[0][:, :own, :own], embedded, memory)
            kept, new = rules[layer](stream)
            last = max(i for i in range(own) if kinds[i])
            for i in set(range(own)) - set(kept):
                if tags[i] >= 0:
                    trace.logits[tags[i]] = model.lm_head(base.norm(hidden[0, i]))
            front, back = ([i for i in kept if (i <= last) == early] for early in (True, False))
            rows = [hidden[0, i] for i in front] + [x for _, x in new] + [hidden[0, i] for i in back]
            for i, _ in new:
                if tags[i] >= 0:
                    trace.logits[tags[i]] = float("nan")
            tags = [tags[i] for i in front] + [-1 - tags[i] for i, _ in new] + [tags[i] for i in back]
            kinds = [kinds[i] for i in front] + [True for _ in new] + [kinds[i] for i in back]
            hidden = torch.cat([torch.stack(rows)[None], hidden[:, own:]], 1)
            trace.alive.append(list(range(len(tags))))
        logits = model.lm_head(base.norm(hidden))[0]
    for row, tag in enumerate([*tags, *range(prompt, total)]):
        if tag >= 0:
            trace.logits[tag] = logits[row]
    return trace


def next_layer(seen: Seen | Stream) -> tuple[Tensor, Tensor]:
    """Queries and keys that the next layer would make of what is there, ``[H, N, D]``, keys repeated."""
    return projected(seen.model.model.layers[seen.layer + 1], seen.hidden, seen.turned)


def projected(module: nn.Module, hidden: Tensor, turned: tuple[Tensor, Tensor]) -> tuple[Tensor, Tensor]:
    """Queries and keys that a layer makes of ``[N, C]``, ``[H, N, D]``, keys repeated, turned by cosines and sines."""
    with torch.no_grad():
        given = module.input_layernorm(hidden)
        width = module.self_attn.head_dim
        query = module.self_attn.q_proj(given).unflatten(-1, (-1, width)).transpose(0, 1)
        key = module.self_attn.k_proj(given).unflatten(-1, (-1, width)).transpose(0, 1)
    cos, sin = turned

    def turn(x: Tensor) -> Tensor:
        half = width // 2
        other = torch.cat([-x[..., half:], x[..., :half]], -1)
        return x * cos + other * sin

    query, key = turn(query), turn(key)
    return query, key.repeat_interleave(query.shape[0] // key.shape[0], 0)


def read_alone(model: nn.Module, ids: Tensor) -> tuple[Tensor, Any]:
    """The model's own logits and cache of a row ``[T]``, positions from 0."""
    with torch.no_grad():
        out = model(input_ids=ids[None], use_cache=True, past_key_values=DynamicCache())
    return out.logits[0], out.past_key_values
