"""Focus-DETR (arXiv:2307.12612) against layers that are run for all tokens, of which a few rows are taken."""

from __future__ import annotations

import copy
import itertools
from collections.abc import Sequence
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import save_file
from torch import Tensor, nn
from torch.export import Dim
from transformers import DeformableDetrConfig, DeformableDetrForObjectDetection, ResNetConfig
from transformers.models.deformable_detr.modeling_deformable_detr import DeformableDetrEncoder

from tests.passes.layers import Weights, linear, mlp, mlp_weights, random
from tests.passes.oracle import policy, run_engine
from tests.passes.reference_models import WIDTH, audio, frames, sentences, text
from tokcc.errors import AxisError, PlanError, PolicyError
from tokcc.testing import reduce_program, run_program, trace

LEVELS = ((5, 4), (3, 2), (1, 1))
_TOKENS = 27


class Detector(nn.Module):
    """A deformable encoder over the tokens of three feature maps of fixed sizes."""

    def __init__(self, layers: int) -> None:
        super().__init__()
        config = DeformableDetrConfig(
            d_model=WIDTH,
            encoder_layers=layers,
            encoder_attention_heads=4,
            encoder_ffn_dim=48,
            num_feature_levels=len(LEVELS),
            encoder_n_points=2,
            use_timm_backbone=False,
            dropout=0.0,
        )
        self.encoder = DeformableDetrEncoder(config)
        self.head = nn.Linear(WIDTH, 3)
        self.place = nn.Parameter(torch.zeros(1, _TOKENS, WIDTH))
        generator = torch.Generator().manual_seed(9)
        for parameter in self.parameters():
            parameter.data = torch.randn(parameter.shape, generator=generator) / parameter.shape[-1] ** 0.5

    def layer_arguments(self, x: Tensor) -> dict[str, Any]:
        starts = [sum(h * w for h, w in LEVELS[:i]) for i in range(len(LEVELS))]
        return {
            "spatial_shapes": torch.tensor(LEVELS),
            "spatial_shapes_list": list(LEVELS),
            "level_start_index": torch.tensor(starts),
            "spatial_position_embeddings": self.place.expand(x.shape[0], -1, -1),
        }

    def forward(self, x: Tensor) -> dict[str, Tensor]:
        ratios = torch.ones(x.shape[0], len(LEVELS), 2)
        y = self.encoder(inputs_embeds=x, valid_ratios=ratios, **self.layer_arguments(x)).last_hidden_state
        return {"tokens": y, "classes": self.head(y)}


@cache
def detector(layers: int = 3) -> Detector:
    return Detector(layers).eval()


def maps(batch: int, seed: int = 0) -> dict[str, Tensor]:
    return {"x": torch.randn(batch, _TOKENS, WIDTH, generator=torch.Generator().manual_seed(seed))}


def scorer(levels: int = len(LEVELS)) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(21)
    made = {
        "norm.weight": 1 + 0.3 * torch.randn(WIDTH, generator=generator),
        "norm.bias": 0.1 * torch.randn(WIDTH, generator=generator),
        "embed.weight": 2 * random(generator, 24, WIDTH),
        "embed.bias": torch.randn(24, generator=generator),
    }
    plain = mlp_weights(generator, "", [24, 12, 6, 1])
    made |= {name.removeprefix("."): tensor for name, tensor in plain.items()}
    if levels > 1:
        made["alpha"] = torch.randn(levels - 1, generator=generator)
    return made


def saved(folder: Path, weights: Weights) -> str:
    save_file(dict(weights), folder / "foreground.safetensors")
    return str(folder / "foreground.safetensors")


def foreground(x: Tensor, weights: Weights, levels: Sequence[tuple[int, int]] = LEVELS) -> Tensor:
    """The logits of one sample's tokens ``[N, C]``, coarsest map first, as published."""
    parts = list(x.split([h * w for h, w in levels]))
    found: list[Tensor] = []
    for level in reversed(range(len(levels))):
        own = parts[level]
        if found:
            coarse = found[0].reshape(1, 1, *levels[level + 1])
            up = F.interpolate(coarse, levels[level], mode="bilinear", align_corners=True).reshape(-1, 1)
            own = own + weights["alpha"][level] * (own * up)
        z = F.gelu(linear(F.layer_norm(own, (WIDTH,), weights["norm.weight"], weights["norm.bias"]), weights, "embed"))
        z = torch.cat([z[:, :12], z[:, 12:].mean(0, keepdim=True).expand(len(z), -1)], 1)
        named = {f"score.{name}": tensor for name, tensor in weights.items()}
        found.insert(0, mlp(z, named, "score", 3, "gelu").reshape(-1))
    return torch.cat(found)


def through(model: Detector, layer: nn.Module, x: Tensor, there: Tensor | None = None) -> Tensor:
    """One layer of the model's own, for all tokens."""
    places = model.encoder.get_reference_points(LEVELS, torch.ones(1, len(LEVELS), 2), device=x.device)
    made = layer(hidden_states=x, attention_mask=there, reference_points=places, **model.layer_arguments(x))
    return made[0] if isinstance(made, tuple) else made


@torch.no_grad()
def focused(model: Detector, x: Tensor, weights: Weights, counts: Sequence[int]) -> tuple[Tensor, list[set[int]]]:
    """One sample: every layer of the model's own, then only the rows of its best tokens are taken."""
    rating = foreground(x[0], weights)
    chosen: list[set[int]] = []
    for layer, count in zip(model.encoder.layers, counts, strict=True):
        everything = through(model, layer, x)
        best = sorted(range(_TOKENS), key=lambda i: (-float(rating[i]), i))[:count]
        chosen.append(set(best))
        x = x.clone()
        x[0, best] = everything[0, best]
    return x[0], chosen


def step(path: str | None, keep: Sequence[float | int], **changes: Any) -> dict[str, Any]:
    return {"preset": "focus-detr", "weights": path, "levels": [list(s) for s in LEVELS], "keep": list(keep), **changes}


def check(
    counts: Sequence[int], keep: Sequence[float | int], tmp_path: Path, batch: int = 3, dynamic: Any = None
) -> None:
    weights = scorer()
    model, feeds = detector(len(counts)), maps(batch)
    program = trace(model, maps(2) if dynamic else feeds, dynamic)
    reduced, plan = reduce_program(program, policy(step(saved(tmp_path, weights), keep)))
    assert len(plan.reductions) == len(counts)
    outputs = run_program(reduced, feeds)
    for mine, theirs in zip(run_engine(reduced, feeds), outputs, strict=True):
        torch.testing.assert_close(mine, theirs, rtol=0, atol=1e-4)
    for row in range(batch):
        wanted, chosen = focused(model, feeds["x"][row : row + 1], weights, counts)
        torch.testing.assert_close(outputs[0][row], wanted, rtol=0, atol=1e-4)
        torch.testing.assert_close(outputs[1][row], model.head(wanted), rtol=0, atol=1e-4)
        assert all(later <= earlier for earlier, later in itertools.pairwise(chosen))


def test_shares_of_all_tokens(tmp_path: Path) -> None:
    check([13, 8, 2], [0.5, 0.3, 0.1], tmp_path)


def test_numbers_of_tokens(tmp_path: Path) -> None:
    check([20, 20, 1], [20, 20, 1], tmp_path)


@pytest.mark.parametrize(
    ("batch", "counts", "keep"),
    [(4, [8], [0.3]), pytest.param(1, [13, 8, 2], [0.5, 0.3, 0.1], marks=pytest.mark.slow)],
)
def test_any_number_of_images(batch: int, counts: list[int], keep: list[float], tmp_path: Path) -> None:
    check(counts, keep, tmp_path, batch, {"x": {0: Dim("batch", min=1, max=9)}})


@torch.no_grad()
def test_a_drop_that_gives_tokens_back_to_the_maps() -> None:
    """Deformable layers behind a cut sample maps in which dropped tokens are masked, for those that are left."""
    feeds, model = maps(3), detector()
    at = {"layers": [0], "site": "block_output"}
    drop = {"node": "prune", "at": at, "score": {"kind": "norm"}, "select": {"kind": "topk"}, "budget": {"tokens": 9}}
    reduced, _ = reduce_program(trace(model, feeds), policy({**drop, "restore": "scatter"}, "full"))
    tokens = run_engine(reduced, feeds)[0]
    for row in range(3):
        x = feeds["x"][row : row + 1]
        kept = torch.arange(_TOKENS)
        for number, layer in enumerate(model.encoder.layers):
            there = torch.zeros(1, _TOKENS, dtype=torch.bool).index_fill(1, kept, True)
            everything = through(model, layer, x, there)
            x = x.clone()
            x[0, kept] = everything[0, kept]
            kept = x[0].norm(dim=1).topk(9).indices if number == 0 else kept
        torch.testing.assert_close(tokens[row], x[0], rtol=0, atol=1e-4)
    with pytest.raises(AxisError, match="cannot prune tokens at layer 0"):
        reduce_program(trace(model, feeds), policy(drop))


def test_all_tokens_are_the_plain_encoder(tmp_path: Path) -> None:
    feeds = maps(2)
    reduced, _ = reduce_program(trace(detector(), feeds), policy(step(saved(tmp_path, scorer()), [1.0, 1.0, 1.0])))
    torch.testing.assert_close(run_program(reduced, feeds)[0], detector()(**feeds)["tokens"], rtol=0, atol=1e-5)


def test_only_the_chosen_go_through_the_mlp(tmp_path: Path) -> None:
    """The values are of all 27 tokens, places, weights, projections and MLP of 5."""
    feeds = maps(1)
    reduced, _ = reduce_program(trace(detector(), feeds), policy(step(saved(tmp_path, scorer()), [5, 5, 5])))
    linears = [n for n in reduced.graph.nodes if n.target is torch.ops.aten.linear.default]
    sizes = [tuple(n.meta["val"].shape)[1] for n in linears if "encoder_layers_2" in str(n.args[1])]
    assert sorted(sizes) == [5, 5, 5, 5, 5, 27]
    sampled = [n.meta["val"].shape[2] for n in reduced.graph.nodes if n.target is torch.ops.aten.grid_sampler.default]
    assert sampled == [5] * 9


class Whole(nn.Module):
    """A detector from pixels to boxes: backbone, deformable encoder, decoder with queries of its own."""

    def __init__(self) -> None:
        super().__init__()
        backbone = ResNetConfig(
            embedding_size=8,
            hidden_sizes=[8, 8, 12, 16],
            depths=[1, 1, 1, 1],
            layer_type="basic",
            out_features=["stage2", "stage3", "stage4"],
        )
        config = DeformableDetrConfig(
            d_model=WIDTH,
            encoder_layers=2,
            decoder_layers=2,
            encoder_attention_heads=4,
            decoder_attention_heads=4,
            encoder_ffn_dim=48,
            decoder_ffn_dim=48,
            encoder_n_points=2,
            decoder_n_points=2,
            num_queries=7,
            backbone_config=backbone,
            use_timm_backbone=False,
            backbone=None,
            use_pretrained_backbone=False,
            dropout=0.0,
        )
        self.detector = DeformableDetrForObjectDetection(config)

    def forward(self, pixels: Tensor) -> dict[str, Tensor]:
        found = self.detector(pixel_values=pixels)
        return {"logits": found.logits, "boxes": found.pred_boxes}


@pytest.mark.slow
@torch.no_grad()
def test_a_whole_detector(tmp_path: Path) -> None:
    """Hooks on the model's own layers put back what passes them by; its decoder is left alone."""
    levels, counts = ((8, 12), (4, 6), (2, 3), (1, 2)), (64, 20)
    torch.manual_seed(3)
    model, weights = Whole().eval(), scorer(len(levels))
    feeds = {"pixels": torch.randn(2, 3, 64, 96, generator=torch.Generator().manual_seed(2))}
    wanted = {"preset": "focus-detr", "weights": saved(tmp_path, weights), "keep": list(counts)}
    wanted["levels"] = [list(level) for level in levels]
    reduced, plan = reduce_program(trace(model, feeds), {"version": 1, "steps": [wanted]})
    assert [r.layer for r in plan.reductions] == [0, 1]
    outputs = run_engine(reduced, feeds)
    untouched = model(**feeds)
    ratings: list[Tensor] = []

    def passed_by(number: int) -> Any:
        def hook(module: nn.Module, args: Any, kwargs: dict[str, Any], made: Any) -> Any:
            x = kwargs["hidden_states"] if "hidden_states" in kwargs else args[0]
            if number == 0:
                ratings.extend(foreground(row, weights, levels) for row in x)
            whole = made[0] if isinstance(made, tuple) else made
            new = x.clone()
            for row, rating in enumerate(ratings):
                best = rating.topk(counts[number]).indices
                new[row, best] = whole[row, best]
            return (new, *made[1:]) if isinstance(made, tuple) else new

        return hook

    for number, layer in enumerate(model.detector.model.encoder.layers):
        layer.register_forward_hook(passed_by(number), with_kwargs=True)
    for mine, theirs in zip(outputs, model(**feeds).values(), strict=True):
        torch.testing.assert_close(mine, theirs, rtol=0, atol=1e-4)
    assert (outputs[0] - untouched["logits"]).abs().max() > 1e-3


def plain(kept: Sequence[int], layers: Sequence[int]) -> dict[str, Any]:
    score = {"kind": "at_first", "of": {"kind": "norm"}}
    at = {"layers": list(layers), "site": "block_input"}
    return {
        "node": "prune", "at": at, "score": score, "select": {"kind": "topk"}, "reduce": {"kind": "bypass"},
        "budget": {"schedule": list(kept)},
    }  # fmt: skip


class TestPlainAttention:
    """Layers of any transformer can be passed by."""

    @torch.no_grad()
    def test_images(self) -> None:
        feeds, model = {"frames": frames(3, 21)}, audio()
        reduced, _ = reduce_program(trace(model, feeds), policy(plain([12, 8, 5], [0, 1, 3])))
        (tokens,) = run_engine(reduced, feeds)[:1]
        x = model.embed(feeds["frames"])
        rating = x.norm(dim=2)
        for layer, block in enumerate(model.blocks):
            count = {0: 12, 1: 8, 3: 5}.get(layer, 21)
            everything = block(x)
            best = rating >= rating.sort(dim=1, descending=True).values[:, count - 1 : count]
            x = torch.where(best[:, :, None], everything, x)
        torch.testing.assert_close(tokens, model.norm(x), rtol=0, atol=1e-4)

    @torch.no_grad()
    def test_padding(self) -> None:
        """Every row is what it is alone; padding is nobody's query."""
        feeds, model = sentences([20, 12, 6]), text()
        wanted = plain([], [1, 2]) | {"budget": {"keep": 0.5}, "protect": {"first": 1}}
        reduced, _ = reduce_program(trace(model, feeds), policy(wanted))
        tokens = run_engine(reduced, feeds)[0]
        for row, length in enumerate([20, 12, 6]):
            x = model.embed(feeds["ids"][row : row + 1, :length])
            rating: Tensor | None = None
            for layer, block in enumerate(model.blocks):
                everything = block(x, None)
                if layer in (1, 2):
                    rating = x[0].norm(dim=1) if rating is None else rating
                    best = 1 + rating[1:].topk(length // 2).indices  # of length - 1, rounded up
                    kept = torch.zeros(length, dtype=torch.bool)
                    kept[[0, *best.tolist()]] = True
                    everything = torch.where(kept[None, :, None], everything, x)
                x = everything
            torch.testing.assert_close(tokens[row, :length], model.norm(x)[0], rtol=0, atol=1e-4)

    @torch.no_grad()
    def test_with_another_step(self) -> None:
        """What is dropped between two such layers is dropped of all tokens, those that passed one by included."""
        feeds, model = {"frames": frames(2, 21)}, audio()
        drop = {"node": "prune", "at": {"layers": [1], "site": "block_output"}, "score": {"kind": "norm"}}
        drop |= {"select": {"kind": "topk"}, "budget": {"tokens": 10}}
        wanted = {"version": 1, "steps": [plain([7, 4], [1, 2]), drop], "outputs": {"tokens": "reduced"}}
        reduced, _ = reduce_program(trace(model, feeds), wanted)
        tokens, index = run_program(reduced, feeds)
        for row in range(2):
            x = model.embed(feeds["frames"][row : row + 1])
            rating = None
            for layer, block in enumerate(model.blocks):
                everything = block(x)
                if layer in (1, 2):
                    rating = x[0].norm(dim=1) if rating is None else rating
                    best = rating.topk({1: 7, 2: 4}[layer]).indices
                    x = x.clone()
                    x[0, best] = everything[0, best]
                else:
                    x = everything
                if layer == 1:
                    kept = x[0].norm(dim=1).topk(10).indices.sort().values
                    assert index[row].tolist() == kept.tolist()
                    assert rating is not None
                    x, rating = x[:, kept], rating[kept]
            torch.testing.assert_close(tokens[row], model.norm(x)[0], rtol=0, atol=1e-5)


def test_half_precision(tmp_path: Path) -> None:
    feeds = maps(2)
    wanted = policy(step(saved(tmp_path, scorer()), [0.5, 0.3, 0.1]))
    half = {"x": feeds["x"].half()}
    model = copy.deepcopy(detector()).half()
    reduced, _ = reduce_program(trace(_Half(model), half), wanted)
    tokens = run_engine(reduced, half)[0]
    assert tokens.dtype == torch.float16
    exact = run_program(reduce_program(trace(detector(), feeds), wanted)[0], feeds)[0]
    assert (tokens.float() - exact).abs().mean() < 0.05 * exact.abs().mean()


class _Half(nn.Module):
    """The same with valid ratios of the model's type."""

    def __init__(self, model: Detector) -> None:
        super().__init__()
        self.model = model

    def forward(self, x: Tensor) -> dict[str, Tensor]:
        ratios = torch.ones(x.shape[0], len(LEVELS), 2, dtype=x.dtype)
        y = self.model.encoder(inputs_embeds=x, valid_ratios=ratios, **self.model.layer_arguments(x)).last_hidden_state
        return {"tokens": y}


class TestRefusals:
    def test_weights_are_needed(self) -> None:
        with pytest.raises(PolicyError, match="`foreground` is trained, and no weights are given"):
            reduce_program(trace(detector(), maps(1)), policy(step(None, [5, 5, 5])))

    def test_levels_are_needed(self, tmp_path: Path) -> None:
        with pytest.raises(PolicyError, match="levels"):
            reduce_program(trace(detector(), maps(1)), policy(step(saved(tmp_path, scorer()), [5, 5, 5], levels=None)))

    def test_other_levels(self, tmp_path: Path) -> None:
        wanted = policy(step(saved(tmp_path, scorer(2)), [5, 5, 5], levels=[[5, 4], [3, 2]]))
        with pytest.raises(AxisError, match="not those of the maps"):
            reduce_program(trace(detector(), maps(1)), wanted)

    def test_a_schedule_of_another_depth(self, tmp_path: Path) -> None:
        with pytest.raises(PlanError, match="the schedule has 2 entries for 3 layers"):
            reduce_program(trace(detector(), maps(1)), policy(step(saved(tmp_path, scorer()), [5, 5])))

    @pytest.mark.parametrize(
        ("change", "message"),
        [
            ({"at": {"layers": [1], "site": "block_output"}}, "stands behind the cut"),
            ({"reduce": {"kind": "drop"}}, "can only pass it by"),
        ],
    )
    def test_the_wrong_place(self, change: dict[str, Any], message: str) -> None:
        wanted = policy({**plain([5], [1]), **change})
        with pytest.raises(PlanError, match=message):
            reduce_program(trace(audio(), {"frames": frames(1, 21)}), wanted)

    def test_a_cut_inside(self) -> None:
        drop = {"node": "prune", "at": {"layers": [1]}, "score": {"kind": "norm"}, "budget": {"keep": 0.5}}
        wanted = {"version": 1, "steps": [plain([5], [1]), {**drop, "select": {"kind": "topk"}}]}
        with pytest.raises(PlanError, match="tokens pass layer 1 by, and another step reduces them inside it"):
            reduce_program(trace(audio(), {"frames": frames(1, 21)}), wanted)

    def test_two_such_steps_for_one_layer(self) -> None:
        wanted = {"version": 1, "steps": [plain([5], [1]), {**plain([5], [1]), "score": {"kind": "random"}}]}
        with pytest.raises(PlanError, match="two steps choose the tokens that layer 1 runs for"):
            reduce_program(trace(audio(), {"frames": frames(1, 21)}), wanted)

    def test_attention_that_is_not_there(self) -> None:
        wanted = policy({"preset": "random", "score": {"kind": "attention_received"}, "keep": 0.5})
        with pytest.raises(PlanError, match="attention"):
            reduce_program(trace(detector(), maps(1)), wanted)
