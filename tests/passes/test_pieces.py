"""Scores, selectors and reducers one by one, on real tensors, and how they are found and refused."""

from __future__ import annotations

import importlib
from fractions import Fraction
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from tokcc.analysis.context import Context
from tokcc.config import PieceSpec
from tokcc.errors import AxisError, PolicyError
from tokcc.ir.builder import EagerBuilder
from tokcc.ir.space import TokenSpace
from tokcc.passes.budget import Count
from tokcc.passes.cut import AttentionView, Cut, Kept
from tokcc.passes.features import features
from tokcc.passes.piece import Piece, Reducer, Score, Selector, pieces, resolve_piece, scores_of
from tokcc.passes.reducers.drop import Drop
from tokcc.passes.reducers.fuse_rest import FuseRest
from tokcc.passes.scores.attention_received import AttentionReceived
from tokcc.passes.scores.attention_rows import AttentionRows
from tokcc.passes.scores.norm import Norm
from tokcc.passes.scores.similarity import Similarity
from tokcc.passes.selectors.greedy import Greedy
from tokcc.passes.selectors.topk import TopK

BATCH, TOKENS, WIDTH, HEADS = 2, 15, 8, 2


def random(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def make_cut(keep: int, *, first: int = 0, last: int = 0, lengths: list[int] | None = None, **changes: Any) -> Cut:
    x = changes.pop("x", random(BATCH, TOKENS, WIDTH))
    real = None if lengths is None else torch.arange(TOKENS)[None] < torch.tensor(lengths)[:, None]
    space = TokenSpace("tokens", TOKENS, TOKENS, real=real)
    query, key, value = (random(BATCH, HEADS, TOKENS, WIDTH // HEADS, seed=s) for s in (1, 2, 3))
    mask = None if real is None else real[:, None, None, :]
    view = AttentionView(query, key, value, mask, 0.5)
    same = {"attention": lambda layer=None: view}
    fields: dict[str, Any] = {"layer": 3, "num_layers": 4, "seed": 0, **same, **changes}
    return Cut(
        ctx=Context(EagerBuilder()),
        x=x,
        space=space,
        batch=TokenSpace("batch", BATCH, BATCH, is_batch=True),
        count=Count("tokens", Fraction(keep)),
        first=first,
        last=last,
        **fields,
    )


def normalised(x: Tensor) -> Tensor:
    return x / x.norm(dim=-1, keepdim=True)


class TestDiscovery:
    @pytest.mark.parametrize("folder", ["scores", "selectors", "reducers"])
    def test_one_kind_for_each_file(self, folder: str) -> None:
        package = importlib.import_module(f"tokcc.passes.{folder}")
        files = {path.stem for path in Path(package.__path__[0]).glob("*.py")}
        assert set(pieces(folder)) == files - {"__init__"}
        assert {"topk", "drop", "norm"} & files
        for kind, piece in pieces(folder).items():
            assert piece.kind == kind
            assert piece.__module__ == f"tokcc.passes.{folder}.{kind}"
            assert piece.__doc__

    @pytest.mark.parametrize("folder", ["scores", "selectors", "reducers"])
    def test_parameters_are_documented(self, folder: str) -> None:
        for piece in pieces(folder).values():
            documented = "".join(base.__doc__ or "" for base in piece.__mro__ if issubclass(base, Piece))
            for name in piece.model_fields:
                assert f"{name}:" in documented or f"{name} =" in documented, (piece, name)

    def test_unknown_kind_names_the_nearest(self) -> None:
        with pytest.raises(PolicyError, match="unknown selector `topp`") as caught:
            resolve_piece(PieceSpec(kind="topp"), Selector, "selectors", "policy.yaml:4")
        assert caught.value.help == "did you mean `topk`?"
        assert "uniform" in (caught.value.needed or "")
        assert caught.value.policy == "policy.yaml:4"

    def test_kinds_of_other_groups_say_what_they_are_for(self) -> None:
        with pytest.raises(PolicyError, match="`regions` is for sparse attention of encoders"):
            resolve_piece(PieceSpec(kind="regions"), Selector, "selectors", "here")
        with pytest.raises(PolicyError, match="unknown reducer `thrown_away`"):  # not all groups have reducers
            resolve_piece(PieceSpec(kind="thrown_away"), Reducer, "reducers", "here")

    def test_unknown_parameter_names_the_nearest(self) -> None:
        with pytest.raises(PolicyError, match="relevence") as caught:
            resolve_piece(PieceSpec.model_validate({"kind": "greedy", "relevence": 0.5}), Selector, "selectors", "here")
        assert caught.value.help == "did you mean `relevance`?"
        assert "relevance, start" in (caught.value.needed or "")

    @pytest.mark.parametrize(
        ("folder", "base", "spec"),
        [
            ("selectors", Selector, {"kind": "greedy", "relevance": 1.5}),
            ("selectors", Selector, {"kind": "energy", "margin": 2}),
            ("selectors", Selector, {"kind": "similarity_then_topk", "duplicates": -1}),
            ("scores", Score, {"kind": "attention_rows", "heads": "median"}),
            ("scores", Score, {"kind": "attention_rows", "from_layers": [1]}),
            ("scores", Score, {"kind": "attention_rows", "rows": [0, 2]}),
            ("scores", Score, {"kind": "attention_rows", "since": 2, "from_layers": [-1]}),
            ("scores", Score, {"kind": "attention_rows", "since": 2, "layer": 1}),
            ("scores", Score, {"kind": "norm", "sign": 0}),
            ("reducers", Reducer, {"kind": "fuse_rest", "normalise": "maybe"}),
        ],
    )
    def test_values_out_of_range(self, folder: str, base: type[Piece], spec: dict[str, Any]) -> None:
        with pytest.raises(PolicyError, match=spec["kind"]):
            resolve_piece(PieceSpec.model_validate(spec), base, folder, "here")


class TestScores:
    @pytest.mark.parametrize("sign", [1, -1])
    def test_norm_of_features(self, sign: Any) -> None:
        cut = make_cut(5)
        torch.testing.assert_close(Norm(sign=sign).emit(cut), sign * cut.x.norm(dim=2))

    @pytest.mark.parametrize("of", ["keys", "values"])
    def test_norm_over_all_heads(self, of: Any) -> None:
        cut = make_cut(5)
        view = cut.attention()
        vectors = (view.key if of == "keys" else view.value).transpose(1, 2).flatten(2)
        torch.testing.assert_close(Norm(of=of).emit(cut), vectors.norm(dim=2))

    def test_similarity_to_the_mean_of_real_tokens(self) -> None:
        cut = make_cut(5, lengths=[15, 9])
        score = Similarity().emit(cut)
        for row, length in enumerate((15, 9)):
            unit = normalised(cut.x[row, :length])
            torch.testing.assert_close(score[row, :length], unit @ normalised(unit.mean(0)))

    def test_similarity_to_the_class_token(self) -> None:
        cut = make_cut(5)
        unit = normalised(cut.x)
        expected = -(unit * unit[:, :1]).sum(2)
        torch.testing.assert_close(Similarity(to="cls", sign=-1).emit(cut), expected)

    def test_attention_of_rows(self) -> None:
        cut = make_cut(5)
        view = cut.attention()
        probs = (view.query @ view.key.transpose(2, 3) * 0.5).softmax(-1)
        torch.testing.assert_close(AttentionRows().emit(cut), probs[:, :, 0].mean(1))
        torch.testing.assert_close(AttentionRows(rows="last", heads="max").emit(cut), probs[:, :, -1].amax(1))
        torch.testing.assert_close(AttentionRows(rows=(2, 3), heads="sum").emit(cut), probs[:, :, 2:4].mean(2).sum(1))
        twice = AttentionRows(from_layers=(0, -1), combine="mean").emit(cut)
        torch.testing.assert_close(twice, probs[:, :, 0].mean(1))
        received = AttentionReceived(skip_diagonal=True).emit(cut)
        mean = probs.mean(1)
        torch.testing.assert_close(received, (mean.sum(1) - mean.diagonal(dim1=1, dim2=2)) / TOKENS)

    def test_layers_of_a_sum(self) -> None:
        assert AttentionRows().layers(5, 12) == (5,)
        assert AttentionRows(since=-6).layers(11, 12) == tuple(range(6, 12))
        assert AttentionRows(since=-6).layers(3, 4) == (0, 1, 2, 3)
        assert AttentionRows(since=9).layers(3, 12) == (3,)
        assert AttentionRows(from_layers=(0, -2)).layers(5, 12) == (5, 3)

    def test_one_softmax_over_the_whole_width(self) -> None:
        cut = make_cut(5)
        view = cut.attention()
        query, key = (x.transpose(1, 2).flatten(2) for x in (view.query, view.key))  # [B, N, C]
        logits = (query[:, 0, None] @ key.transpose(1, 2))[:, 0] * view.scale / HEADS**0.5
        torch.testing.assert_close(AttentionRows(heads="joint").emit(cut), logits.softmax(-1))

    @pytest.mark.parametrize("score", [AttentionRows, AttentionReceived])
    def test_one_layer_by_number_or_fraction(self, score: Any) -> None:
        assert [score(layer=choice).layers(5, 12) for choice in (None, 0, -8, 0.25, 3.0)] == [
            (5,),
            (0,),
            (4,),
            (3,),
            (3,),
        ]
        asked: list[int] = []
        view = make_cut(5).attention()
        cut = make_cut(5, attention=lambda layer=None: asked.append(layer) or view)
        score(layer=1).emit(cut)
        assert asked == [1]
        for layer, message in ((9, "layer 9 does not exist"), (3, "layer 3 runs behind the cut at layer 2")):
            with pytest.raises(AxisError, match=message):
                score(layer=layer).emit(make_cut(5, layer=2))

    def test_another_score_as_a_parameter(self) -> None:
        """It is found, and what is wrong with it is said at the step's place."""
        by = {"kind": "attention_received", "layer": 1}
        made = resolve_piece(PieceSpec(kind="neighbourhoods", params={"by": by}), Selector, "selectors", "here")
        assert [score.layers(3, 4) for score in scores_of(None, made)] == [(1,)]
        spec = PieceSpec(kind="neighbourhoods", params={"by": {"kind": "attention_receive"}})
        with pytest.raises(PolicyError, match="unknown score `attention_receive`") as caught:
            resolve_piece(spec, Selector, "selectors", "policy.yaml:9")
        assert caught.value.policy == "policy.yaml:9"

    def test_norms(self) -> None:
        cut = make_cut(5)
        mean = cut.attention().value.mean(1)
        torch.testing.assert_close(Norm(of="values", heads="mean", power=1).emit(cut), mean.abs().sum(2))

    def test_what_the_rest_of_the_program_makes_of_tokens(self) -> None:
        weight = random(WIDTH, 3, seed=9)
        cut = make_cut(5, first=1, ahead=lambda x, places: x @ weight + places[:, None])
        made = features(cut, "outputs", normalise=False)
        assert not made[:, 0].any()
        torch.testing.assert_close(made[:, 1:], cut.x[:, 1:] @ weight + torch.arange(TOKENS - 1.0)[:, None])

    def test_layers_before_the_first_are_refused(self) -> None:
        with pytest.raises(AxisError, match="4 layers before layer 3"):
            AttentionRows(from_layers=(-4,)).emit(make_cut(5))

    def test_the_last_row_of_a_padded_batch_is_refused(self) -> None:
        with pytest.raises(AxisError, match="padding"):
            AttentionRows(rows="last").emit(make_cut(5, lengths=[15, 9]))


class TestSelectors:
    def test_ties_go_to_the_lower_position(self) -> None:
        score = torch.zeros(BATCH, TOKENS)
        assert TopK().select(make_cut(4, first=1), score).index.tolist() == [[0, 1, 2, 3, 4]] * 2

    @pytest.mark.parametrize("lengths", [None, [15, 4]])
    def test_in_the_order_of_the_score(self, lengths: list[int] | None) -> None:
        cut, score = make_cut(6, first=1, lengths=lengths), random(BATCH, TOKENS)
        kept = TopK(order="score").select(cut, score)
        assert not kept.ascending
        for row, length in enumerate(lengths or [TOKENS] * BATCH):
            best = sorted(range(1, length), key=lambda i: -float(score[row, i]))[:6]
            assert kept.index[row, : 1 + len(best)].tolist() == [0, *best]
            assert kept.valid is None or kept.valid[row].tolist() == [True] * (1 + len(best)) + [False] * (
                6 - len(best)
            )

    def test_protected_tokens_at_both_ends(self) -> None:
        score = torch.arange(TOKENS).float().expand(BATCH, -1)
        kept = TopK().select(make_cut(3, first=2, last=1), score)
        assert kept.index.tolist() == [[0, 1, 11, 12, 13, 14]] * 2
        assert kept.size == 6

    def test_protected_end_of_a_padded_batch_is_refused(self) -> None:
        with pytest.raises(AxisError, match="last token of a padded sample"):
            TopK().select(make_cut(3, last=1, lengths=[15, 9]), random(BATCH, TOKENS))

    def test_short_samples_keep_all_they_have(self) -> None:
        kept = TopK().select(make_cut(6, first=1, lengths=[15, 4]), random(BATCH, TOKENS))
        assert kept.index[1, :4].tolist() == [0, 1, 2, 3]
        assert kept.valid[1].tolist() == [True] * 4 + [False] * 3
        assert all(len(set(row)) == 7 for row in kept.index.tolist())

    @pytest.mark.parametrize("lengths", [None, [15, 4]])
    def test_greedy_by_relevance_alone_is_topk(self, lengths: list[int] | None) -> None:
        cut, score = make_cut(6, first=1, lengths=lengths), random(BATCH, TOKENS)
        mine, theirs = Greedy(relevance=1.0).select(cut, score), TopK().select(cut, score)
        assert torch.equal(mine.index, theirs.index)

    @pytest.mark.parametrize("start", ["isolated", "score"])
    def test_greedy_by_distance_alone_is_farthest_point(self, start: Any) -> None:
        cut, score = make_cut(6), random(BATCH, TOKENS)
        kept = Greedy(relevance=0.0, start=start).select(cut, score)
        for row in range(BATCH):
            unit = normalised(cut.x[row])
            distance = 1 - unit @ unit.T
            isolated = distance.sort(0).values[1]
            chosen = [int((score[row] if start == "score" else isolated).argmax())]
            while len(chosen) < 6:
                nearest = distance[chosen].amin(0)
                nearest[chosen] = -1
                chosen.append(int(nearest.argmax()))
            assert kept.index[row].tolist() == sorted(chosen)

    def test_greedy_in_between_is_maximal_marginal_relevance(self) -> None:
        cut, score, lam = make_cut(6), random(BATCH, TOKENS), 0.4
        kept = Greedy(relevance=lam, start="score").select(cut, score)
        for row in range(BATCH):
            unit = normalised(cut.x[row])
            similarity = unit @ unit.T
            importance = (score[row] - score[row].min()) / (score[row].max() - score[row].min())
            chosen = [int(importance.argmax())]
            while len(chosen) < 6:
                value = lam * importance - (1 - lam) * similarity[chosen].amax(0)
                value[chosen] = -torch.inf
                chosen.append(int(value.argmax()))
            assert kept.index[row].tolist() == sorted(chosen)


class TestReducers:
    def test_drop_carries_sizes(self) -> None:
        cut = make_cut(5)
        cut.space.weight, cut.space.bias = torch.rand(BATCH, TOKENS), True
        index = torch.tensor([[0, 3, 4], [1, 2, 9]])
        child = TokenSpace("child", None, TOKENS, parent=cut.space)
        out = Drop().reduce(cut, Kept(index, None, True, 3), child)
        rows = torch.arange(BATCH)[:, None]
        assert torch.equal(out, cut.x[rows, index])
        assert torch.equal(child.weight, cut.space.weight[rows, index])
        assert child.bias

    @pytest.mark.parametrize("normalise", [False, True])
    def test_fused_token(self, normalise: bool) -> None:
        cut, score = make_cut(5), torch.rand(BATCH, TOKENS)
        cut.space.weight = torch.ones(BATCH, TOKENS)
        index = torch.tensor([[0, 3, 4], [1, 2, 9]])
        child = TokenSpace("child", None, TOKENS, parent=cut.space)
        out = FuseRest(normalise=normalise).reduce(cut, Kept(index, None, True, 3, score), child)
        for row in range(BATCH):
            rest = [i for i in range(TOKENS) if i not in index[row].tolist()]
            weights = score[row, rest] / (score[row, rest].sum() if normalise else 1)
            torch.testing.assert_close(out[row, 3], weights @ cut.x[row, rest])
            assert child.index[row, 3] == rest[int(score[row, rest].argmax())]
            assert child.weight[row].tolist() == [1, 1, 1, 12]

    def test_fusing_needs_a_score(self) -> None:
        child = TokenSpace("child", None, TOKENS)
        with pytest.raises(AxisError, match="needs a selection by score"):
            FuseRest().reduce(make_cut(5), Kept(torch.tensor([[0], [1]]), None, True, 1), child)
