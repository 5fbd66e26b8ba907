"""One planned reduction of a prompt, emitted when the walk comes to its cut."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import fx

from tokcc.analysis.walk import Action, Walk
from tokcc.errors import AxisError
from tokcc.ir.space import Factor, TokenSpace
from tokcc.ir.value import Value
from tokcc.passes.cache.cut import CacheCut
from tokcc.passes.cache.visible import slot_rank
from tokcc.passes.give_back import GiveBack
from tokcc.passes.prompt.branches import find_branch
from tokcc.passes.prompt.cut import Branch, PromptCut, Selected
from tokcc.passes.prompt.plan import PlannedPrune, PromptPlan
from tokcc.passes.prompt.refill import Refill
from tokcc.passes.prompt.refill_plan import RefillPlan
from tokcc.passes.prompt.stream import PromptStream

__all__ = ["prompt_actions"]

aten = torch.ops.aten


def prompt_actions(plan: PromptPlan, *, restored: bool) -> dict[str, list[Action]]:
    """Return what to do at which node.

    Args:
        plan: The reductions.
        restored: Give the tokens back where the stream ends, so that the final norm and the head see all of them.
    """
    actions: dict[str, list[Action]] = {}
    for prune in plan.prunes:
        actions.setdefault(prune.cut, []).append(_Recompute(prune) if prune.reduce.refills else _Prune(prune))
    end = plan.cuts.block_output[-1]
    if (restored or plan.unmerge is not None) and end is not None:
        actions.setdefault(end, []).append(GiveBack())
    return actions


@dataclass(frozen=True)
class _Prune:
    """A reduction."""

    planned: PlannedPrune

    def apply(self, walk: Walk, node: fx.Node, value: Value) -> Value:
        """Emit the reduction and return the shorter stream."""
        assert isinstance(walk, PromptStream)
        try:
            with walk.builder.inserting(f"{self.planned.name}@{self.planned.layer}"):
                return self._apply(walk, node, value)
        except AxisError as error:
            what = f"cannot drop tokens of the prompt at layer {self.planned.layer}"
            help = "choose other layers, or report the model"
            raise error.about(what, policy=self.planned.where, help=help) from error

    def _apply(self, walk: PromptStream, node: fx.Node, value: Value) -> Value:
        b, planned = walk.builder, self.planned
        walk.look()
        space = walk.space
        tokens, first = space.size, walk.first_call
        cut = PromptCut(
            b=b,
            x=value.handle,
            layer=planned.behind,
            num_layers=len(walk.sites),
            tokens=tokens,
            kept=None,
            first_call=first,
            candidates=self._candidates(walk, value.handle),
            real=walk.facts["real"],
            padding_first=walk.plan.padding_first,
            present=planned.present,
            remaining=planned.remaining,
            before=max((other.behind for other in walk.plan.prunes if other.behind < planned.behind), default=-1),
            attention=lambda layer: _own(walk, layer),
            probe=lambda rows, layer=None: _probe(walk, node, value, planned, rows, layer),
            branch=lambda layer, kind: _branch(walk, layer, kind),
            entry=lambda: _entry(walk, node, value),
            input=lambda name, dtype: _input(walk, name, dtype),
            fail=walk.ctx.fail,
            facts=walk.facts,
        )
        cut.kept = self._kept(cut, walk, planned.added)
        self._prepare(cut, walk)
        score = None if planned.score is None else planned.score.emit(cut)
        chosen = self._checked(cut, planned.select.select(cut, score))
        remaining = planned.reduce.reduce(cut, chosen)
        child = TokenSpace(
            name=f"prompt/{planned.layer}.{planned.site}",
            size=remaining.size,
            old=space.root.old,
            parent=space,
            index=remaining.index,
            ascending=remaining.ascending,
            suffix=planned.last,
            step=planned.step,
            restore="none",
            base=value.handle,
        )
        walk.become(child, planned.removed)
        self._follow(walk, remaining.index)
        if planned.positions == "compact":
            walk.count_anew(self._places(walk))
        axes = (value.axes[0], (Factor(child, space.root.old),), value.axes[2])
        return value.having(handle=remaining.x, axes=axes)

    def _candidates(self, walk: PromptStream, x: Any) -> Any:
        """Return bool ``[B, N]``: what may go."""
        b, planned = walk.builder, self.planned
        slot = b.arange(walk.space.size, x)
        age = b.call(aten.flip.default, slot, [0])
        free = b.unsqueeze(b.compare("ge", age, planned.last), 0)
        candidates = b.logical_and(walk.facts.get("candidate", walk.facts["real"]), free)
        if planned.first:
            rank = slot_rank(b, walk.facts["real"])
            candidates = b.logical_and(candidates, b.compare("ge", rank, planned.first))
        return candidates

    def _kept(self, cut: PromptCut, walk: PromptStream, added: int) -> Any:
        """Return K: all tokens but those that go, where any do."""
        b, planned = cut.b, self.planned
        if planned.removed is not None:
            return b.sub_sizes(cut.tokens, b.mul_sizes(cut.first_call, planned.removed + added))
        protected = planned.first + planned.last
        current, initial = (b.sub_sizes(size, protected) for size in (cut.tokens, walk.call_size))
        kept = b.add_sizes(planned.count.kept(b, current, initial), protected)
        going = b.max_sizes(b.sub_sizes(cut.tokens, kept), 0)
        return b.sub_sizes(cut.tokens, b.mul_sizes(cut.first_call, going))

    def _checked(self, cut: PromptCut, chosen: Selected) -> Selected:
        """Make the engine fail on a prompt that it is not for: text would go without a word.

        Another number of candidates, or a last token that is padding. An index that is out of bounds is the only thing
        that stops a graph.
        """
        b, planned = cut.b, self.planned
        end = b.slice(cut.real, 1, b.sub_sizes(cut.tokens, 1), None)  # [B, 1]
        fits = b.compare("eq", b.mul(b.cast(b.logical_not(end), torch.int64), cut.first_call), 0)
        if planned.removed is not None:
            found = b.sum(b.cast(cut.candidates, torch.int64), 1, keepdim=True)  # [B, 1]
            if planned.present is None:
                enough = b.compare("ge", b.sub(found, b.sub_sizes(cut.tokens, cut.kept)), 0)
            else:
                enough = b.compare("eq", b.mul(b.sub(found, planned.present), cut.first_call), 0)
            fits = b.logical_and(fits, enough)
        index = b.where(fits, chosen.index, b.add(chosen.index, cut.tokens))
        return Selected(index, chosen.size, chosen.score)

    def _prepare(self, cut: PromptCut, walk: PromptStream) -> None:
        """Add what pieces of such a reduction want besides."""

    def _follow(self, walk: PromptStream, index: Any) -> None:
        """Tell the layers behind the cut which tokens are left."""

    def _places(self, walk: PromptStream) -> Any:
        """Return the place of every token of the call among the real ones that its layers see, int64 ``[B, N]``.

        Of a share or a number of a whole prompt it is not known how many have gone: what a cache behind the cut holds
        of the prompt says it, for padding goes first.
        """
        b = walk.builder
        mask = b.cast(walk.handle(walk.nodes[walk.mask_name]), torch.int64)
        before = b.sum(b.slice(mask, 1, 0, walk.split), 1, keepdim=True)
        if self.planned.removed is None:
            held = b.size(walk.handle(walk.nodes[walk.sites[self.planned.behind + 1].past_key]), 2)
            before = b.sub(before, b.call(aten.clamp_min.default, b.sub(before, held), 0))
        else:
            before = b.call(aten.clamp_min.default, b.sub(before, walk.gone), 0)
        rank = slot_rank(b, walk.facts["real"])
        return b.call(aten.clamp_min.default, b.add(rank, before), 0)


class _Recompute(_Prune):
    """A reduction to the tokens that are computed anew; old entries stand for the others in the caches."""

    def _candidates(self, walk: PromptStream, x: Any) -> Any:
        """Return bool ``[B, N]``: the first R tokens, those with old entries, padding included."""
        b = walk.builder
        refill = walk.refill = Refill.of(b, self._plan(walk), walk.handle(walk.nodes[walk.mask_name]))
        place = b.sub(b.arange(walk.space.size, x), refill.rows)
        return b.logical_and(b.unsqueeze(b.compare("lt", place, 0), 0), b.compare("ge", walk.facts["real"], 0))

    def _kept(self, cut: PromptCut, walk: PromptStream, added: int) -> Any:
        """Return K: all tokens without old entries, and a share of the others."""
        del added
        assert walk.refill is not None
        return walk.refill.computed(cut.b, self.planned.reduce.ratio, cut.tokens)

    def _prepare(self, cut: PromptCut, walk: PromptStream) -> None:
        """Say how many each row may keep, and where old entries are."""
        assert walk.refill is not None
        refill, b = walk.refill, cut.b
        cut.old = lambda layer, part: refill.old(b, layer, part)
        cut.quota = refill.quota(b, self.planned.reduce.ratio, b.logical_and(cut.candidates, cut.real))

    def _checked(self, cut: PromptCut, chosen: Selected) -> Selected:
        """Make the engine fail also where no token is left without old entries: the last one would have no row."""
        chosen, b = super()._checked(cut, chosen), cut.b
        assert cut.old is not None
        rest = b.sub_sizes(cut.tokens, b.size(cut.old(cut.layer, "value"), 2))
        wrong = b.sub_sizes(1, b.min_sizes(rest, 1))
        return Selected(b.add(chosen.index, b.mul_sizes(cut.tokens, wrong)), chosen.size, chosen.score)

    def _follow(self, walk: PromptStream, index: Any) -> None:
        """Let the layers behind the cut fill up their entries."""
        assert walk.refill is not None
        walk.refill = walk.refill.behind(walk.builder, index, walk.call_size)

    def _plan(self, walk: PromptStream) -> RefillPlan:
        assert walk.plan.refill is not None
        return walk.plan.refill


def _view(walk: PromptStream, layer: int, query: Any, key: Any, value: Any) -> CacheCut:
    """Return an attention over the call's own tokens."""
    b, site, size = walk.builder, walk.sites[layer], walk.space.size
    real = walk.facts["real"]
    return CacheCut(
        b=b,
        layer=layer,
        num_layers=len(walk.sites),
        query=query,
        key=key,
        value=value,
        real=real,
        received=None,
        past=0,
        new=size,
        total=size,
        seen=size,
        scale=site.scale,
        softcap=site.softcap,
        capacity=None,
        sinks=0,
        recent=0,
    )


def _own(walk: PromptStream, layer: int) -> CacheCut:
    _refuse_none(walk, layer)
    site = walk.sites[layer]
    values = [walk.aligned(walk.nodes[name]) for name in (site.query, site.new_key, site.new_value)]
    return _view(walk, layer, *(value.handle for value in values))


def _probe(
    walk: PromptStream, node: fx.Node, value: Value, planned: PlannedPrune, rows: Any, layer: int | None
) -> CacheCut:
    """Return the attention of a layer behind the cut over the tokens that are still there, some queries of it."""
    b, nearest = walk.builder, planned.behind + 1
    layer = nearest if layer is None else layer
    if planned.site == "after_attention":
        walk.ctx.fail(
            "the next layer reads what leaves this one",
            needed="`site: block_output`",
            help="leave `at.site` out",
        )
    if layer > nearest:
        node, value = _ahead(walk, node, value, layer)
    site, space = walk.sites[layer], walk.space
    asked = TokenSpace(
        name="asked",
        size=1 if rows is None else b.size(rows, 1),
        old=space.root.old,
        parent=space,
        index=rows,
        step=planned.step,
    )
    if rows is None:
        last = b.sub(b.arange(1, value.handle), b.sub_sizes(1, space.size))  # [1]: N - 1
        asked.index = last
        few = b.slice(value.handle, 1, b.sub_sizes(space.size, 1), None)
    else:
        few = b.call(torch.ops.tokcc.gather_tokens.default, value.handle, rows, 1, 0)
    axes = (value.axes[0], (Factor(asked, space.root.old),), value.axes[2])
    query = walk.rehearse(node, value.having(handle=few, axes=axes), walk.nodes[site.query])
    new_key = walk.nodes[site.new_key]
    key = walk.rehearse(node, value, new_key)
    if planned.positions == "keep" and layer == nearest:
        walk.share(new_key, key)
    return _view(walk, layer, query.handle, key.handle, key.handle)


def _ahead(walk: PromptStream, node: fx.Node, value: Value, layer: int) -> tuple[fx.Node, Value]:
    """Return what a layer further behind would read if all tokens that are still there came to it."""
    name = walk.plan.cuts.block_output[layer - 1]
    if name is None:
        walk.ctx.fail(
            f"layer {layer} does not read the stream that leaves layer {layer - 1}", help="choose another layer"
        )
    stream = walk.nodes[name]
    return stream, walk.rehearse(node, value, stream)


def _branch(walk: PromptStream, layer: int, kind: str) -> Branch:
    _refuse_none(walk, layer)
    nodes = find_branch(walk.program, walk.sites, walk.plan.cuts, layer, kind)
    given, made, hidden = (walk.aligned(node).handle for node in nodes)
    return Branch(given, made, hidden)


def _refuse_none(walk: PromptStream, layer: int) -> None:
    if layer < 0:
        walk.ctx.fail(
            "the method reads a layer in front of the cut, and there is none",
            needed="a method that reads the layer behind it, or numbers that are given",
            help="cut behind a layer: `site: block_output`",
        )


def _entry(walk: PromptStream, node: fx.Node, value: Value) -> Any:
    if node.name == walk.plan.cuts.entry.node:
        return value.handle  # it is being made
    return walk.aligned(walk.nodes[walk.plan.cuts.entry.node]).handle


def _input(walk: PromptStream, name: str, dtype: torch.dtype) -> Any:
    if name not in walk.facts:
        x = walk.input(name, dtype)
        if walk.space.reduced:
            x = walk.builder.gather(x, 1, walk.ctx.index_between(walk.space.root, walk.space))
        walk.facts[name] = x
    return walk.facts[name]
