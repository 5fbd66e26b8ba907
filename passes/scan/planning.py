"""From a policy and a decoder's scans to a concrete plan; refusals happen here."""

from __future__ import annotations

from tokcc.analysis.state_sites import StateSite, seen_tokens
from tokcc.config import LoadedPolicy, PieceSpec, Step
from tokcc.errors import PlanError, PolicyError
from tokcc.ir.program import Program
from tokcc.passes.cache.head import last_token_outputs
from tokcc.passes.chosen_layers import chosen_layers
from tokcc.passes.piece import resolve_piece
from tokcc.passes.scan.piece import ScanReducer, ScanScore, ScanSelector
from tokcc.passes.scan.plan import PlannedFilter, ScanPlan
from tokcc.passes.trained import with_weights

__all__ = ["make_scan_plan"]

_DOING = {"evict_kv": "evict from", "store_kv": "store", "bias_attention": "attend to"}


def make_scan_plan(policy: LoadedPolicy, program: Program, sites: tuple[StateSite, ...]) -> ScanPlan:
    """Resolve a policy against a state-space decoder.

    Raises:
        PlanError: A step cannot be applied.
        PolicyError: A piece or parameter is unknown, or two steps are for one scan.
    """
    seen = seen_tokens(program, sites)
    filters: dict[int, PlannedFilter] = {}
    for number, step in enumerate(policy.policy.steps):
        _refuse_other_steps(policy, number, step)
        if seen is None:
            raise PlanError(
                "the model does not say how long a text is so far",
                policy=policy.where(("steps", number)),
                needed="an input `attention_mask` [B, P + S] with a 1 for every token so far",
                help="compile the Hugging Face folder of the model: tokcc gives the decoder this input",
            )
        for planned in _plan_step(policy, number, step, sites):
            if planned.layer in filters:
                raise PolicyError(
                    f"two steps filter the scan of layer {planned.layer}",
                    policy=policy.where(("steps", number)),
                    found=f"the other is {filters[planned.layer].where}",
                    help="give the steps different layers",
                )
            filters[planned.layer] = planned
    carried = {i for i, name in zip(program.user_output_positions, program.output_names, strict=True) if "." in name}
    heads = tuple(last_token_outputs(policy, program, carried))
    return ScanPlan(policy, sites, tuple(filters[layer] for layer in sorted(filters)), seen, heads)


def _refuse_other_steps(policy: LoadedPolicy, number: int, step: Step) -> None:
    if step.node in _DOING:
        raise PlanError(
            f"the model has no key-value cache to {_DOING[step.node]}: its layers carry states of a fixed size",
            policy=policy.where(("steps", number, "node")),
            needed="a `filter_scan` step for a state-space decoder",
            found=f"`{step.node}`",
            help="use `longmamba`, or a decoder with attention",
        )
    if step.node != "filter_scan":
        raise PlanError(
            f"`{step.node}` steps are not available for state-space decoders",
            policy=policy.where(("steps", number, "node")),
            needed="a `filter_scan` step: every token of a text leaves a row of logits, and a state is made of all",
            help="use `longmamba`, or compile with `--policy none`",
        )


def _plan_step(policy: LoadedPolicy, number: int, step: Step, sites: tuple[StateSite, ...]) -> list[PlannedFilter]:
    where = policy.where(("steps", number))
    if step.at.site != "scan_input":
        raise PolicyError(
            f"a scan is filtered at its input, not at `{step.at.site}`",
            policy=policy.where(("steps", number, "at")),
            needed="`site: scan_input`",
            help="write `at: {site: scan_input}`",
        )
    if step.budget.tokens is None:
        raise PlanError(
            "a filter of scans needs the length up to which texts are scanned whole",
            policy=policy.where(("steps", number, "budget")),
            needed="`tokens`: as long as the texts that the model was trained on",
            found=f"`{step.budget.amount}`",
            help="write for instance `budget: {tokens: 2000}`",
        )
    layers = chosen_layers(policy, number, step, len(sites))
    score, select, reduce = _pieces(policy, number, step)
    sizes = {"layers": len(sites), "channels": sites[0].channels}
    select = with_weights(select, sizes, folder=policy.folder, where=policy.where(("steps", number, "select")))
    try:
        select.check(step.budget.tokens)
    except ValueError as error:
        raise PlanError(
            str(error),
            policy=policy.where(("steps", number, "select")),
            needed="numbers that were measured on this model, for this length",
            help="measure them: `tokcc profile MODEL --tokens N -o FILE.safetensors`, and name that file",
        ) from error
    return [
        PlannedFilter(number, layer, step.name, where, step.budget.tokens, score, select, reduce)
        for layer in layers
        if select.acts(layer)
    ]


def _pieces(policy: LoadedPolicy, number: int, step: Step) -> tuple[ScanScore, ScanSelector, ScanReducer]:
    def place(key: str) -> str:
        return policy.where(("steps", number, key))

    if step.select is None:
        raise PolicyError(
            "`node: filter_scan` needs a selector",
            policy=policy.where(("steps", number)),
            help="add for instance `select: {kind: above, weights: FILE}`",
        )
    score: ScanScore = resolve_piece(
        step.score or PieceSpec(kind="step_size"), ScanScore, "scan.scores", place("score")
    )
    select: ScanSelector = resolve_piece(step.select, ScanSelector, "scan.selectors", place("select"))
    reduce: ScanReducer = resolve_piece(
        step.reduce or PieceSpec(kind="pass_by"), ScanReducer, "scan.reducers", place("reduce")
    )
    return score, select, reduce
