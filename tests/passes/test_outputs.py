"""Output contracts: what the caller gets where an output carries the token axis."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

from tests.zoo import ZOO
from tokcc.errors import PlanError
from tokcc.testing import reduce_program, run_eager, run_program, trace

C, HEADS, TOKENS = 8, 2, 9


class Block(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.norm, self.second = nn.LayerNorm(C), nn.LayerNorm(C)
        self.qkv, self.out = nn.Linear(C, 3 * C), nn.Linear(C, C)
        self.mlp = nn.Sequential(nn.Linear(C, 2 * C), nn.GELU(), nn.Linear(2 * C, C))

    def attend(self, x: Tensor) -> Tensor:
        batch, tokens, _ = x.shape
        q, k, v = (t.reshape(batch, tokens, HEADS, -1).transpose(1, 2) for t in self.qkv(self.norm(x)).chunk(3, -1))
        mixed = nn.functional.scaled_dot_product_attention(q, k, v)
        return x + self.out(mixed.transpose(1, 2).reshape(batch, tokens, -1))

    def feed(self, x: Tensor) -> Tensor:
        return x + self.mlp(self.second(x))

    def forward(self, x: Tensor) -> Tensor:
        return self.feed(self.attend(x))


class Encoder(nn.Module):
    """A pre-norm encoder with a class token, a head per token and the hidden state of its first layer."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.embed = nn.Linear(C, C)
        self.blocks = nn.ModuleList(Block() for _ in range(3))
        self.norm, self.head = nn.LayerNorm(C), nn.Linear(C, 5)

    def finish(self, x: Tensor) -> dict[str, Tensor]:
        x = self.norm(x)
        return {"tokens": x, "scores": self.head(x), "cls": x[:, 0]}

    def forward(self, x: Tensor) -> dict[str, Tensor]:
        x = self.embed(x)
        first = None
        for block in self.blocks:
            x = block(x)
            first = x if first is None else first
        return {**self.finish(x), "hidden": first}


@pytest.fixture(scope="module")
def model() -> Encoder:
    return Encoder().eval()


@pytest.fixture(scope="module")
def inputs() -> dict[str, Tensor]:
    return {"x": torch.randn(2, TOKENS, C, generator=torch.Generator().manual_seed(1))}


def _policy(node: str, outputs: dict[str, Any] | None = None, layer: int = 1, **extra: Any) -> dict[str, Any]:
    step: dict[str, Any] = {"node": node, "at": {"layers": [layer]}, "protect": {"first": 1}, **extra}
    if node == "prune":
        step |= {"score": {"kind": "norm"}, "select": {"kind": "topk"}, "budget": {"keep": 0.5}}
    else:
        step |= {"select": {"kind": "bipartite"}, "budget": {"remove": 3}}
    return {"version": 1, "steps": [step], **({} if outputs is None else {"outputs": outputs})}


def _reduced(model: Encoder, inputs: dict[str, Tensor], policy: dict[str, Any]) -> tuple[dict[str, Tensor], Any]:
    """Run the reduced program; the eager reference must agree."""
    program = trace(model, inputs)
    reduced, plan = reduce_program(program, policy)
    found = run_program(reduced, inputs)
    eager, eager_plan = run_eager(program, policy, inputs)
    for a, b in zip(found, eager, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-5)
    del plan
    return dict(zip(reduced.output_names, found, strict=True)), eager_plan.made


def _rows(x: Tensor, index: Tensor) -> Tensor:
    return x.gather(1, index[..., None].expand(-1, -1, x.shape[2]))


@torch.no_grad()
def _by_hand(model: Encoder, x: Tensor, keep: Tensor) -> tuple[Tensor, Tensor]:
    """The stream at the cut, and the kept rows at the end."""
    cut = model.blocks[1].attend(model.blocks[0](model.embed(x)))  # type: ignore[operator]  # a Block
    return cut, model.blocks[2](model.blocks[1].feed(_rows(cut, keep)))  # type: ignore[operator]  # a Block


def test_full_gives_dropped_tokens_the_value_they_had_when_dropped(model: Encoder, inputs: dict[str, Tensor]) -> None:
    """In the stream, before the final norm and the head, which see all tokens."""
    found, (space,) = _reduced(model, inputs, _policy("prune"))
    cut, kept = _by_hand(model, inputs["x"], space.index)
    expected = model.finish(cut.scatter(1, space.index[..., None].expand_as(kept), kept))
    assert list(found) == ["tokens", "scores", "cls", "hidden"]
    for name, value in expected.items():
        torch.testing.assert_close(found[name], value, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(found["hidden"], model(inputs["x"])["hidden"], rtol=1e-4, atol=1e-5)


def test_full_unmerges(model: Encoder, inputs: dict[str, Tensor]) -> None:
    """Every token gets the value of the one it was merged into."""
    full, (space,) = _reduced(model, inputs, _policy("merge"))
    short, _ = _reduced(model, inputs, _policy("merge", {"*": "reduced"}))
    assign = short["tokens.token_assign"]
    assert short["tokens"].shape[1] == space.size == TOKENS - 3
    assert full["tokens"].shape[1] == assign.shape[1] == TOKENS
    for name in ("tokens", "scores"):
        torch.testing.assert_close(full[name], _rows(short[name], assign), rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(full["cls"], short["cls"], rtol=1e-4, atol=1e-5)


def test_reduced_says_which_tokens_were_kept(model: Encoder, inputs: dict[str, Tensor]) -> None:
    found, (space,) = _reduced(model, inputs, _policy("prune", {"*": "reduced"}))
    assert list(found) == ["tokens", "scores", "cls", "hidden", "tokens.token_index", "scores.token_index"]
    index = found["tokens.token_index"]
    assert index.dtype == torch.int64
    assert torch.equal(index, space.index)
    assert torch.equal(index, found["scores.token_index"])
    _, kept = _by_hand(model, inputs["x"], index)
    for name, value in model.finish(kept).items():
        torch.testing.assert_close(found[name], value, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(
    ("steps", "name"),
    [
        ([], "token_index"),
        ([{"preset": "evit", "budget": {"keep": 1.0}}], "token_index"),
        ([{"preset": "tome", "r": 0}], "token_assign"),
    ],
)
@pytest.mark.parametrize("output", ["*", "tokens"])
def test_reduced_by_nothing_says_that_all_tokens_are_there(
    model: Encoder, inputs: dict[str, Tensor], steps: list[Any], name: str, output: str
) -> None:
    found, _ = _reduced(model, inputs, {"version": 1, "steps": steps, "outputs": {output: "reduced"}})
    mapped = ["tokens"] if output == "tokens" else ["tokens", "scores", "hidden"]
    assert list(found) == ["tokens", "scores", "cls", "hidden", *(f"{each}.{name}" for each in mapped)]
    for each in mapped:
        index = found[f"{each}.{name}"]
        assert index.dtype == torch.int64
        assert index.tolist() == [list(range(TOKENS))] * 2


def test_a_named_output_in_front_of_the_cut_has_all_tokens(model: Encoder, inputs: dict[str, Tensor]) -> None:
    found, _ = _reduced(model, inputs, _policy("prune", {"hidden": "reduced"}))
    assert found["hidden.token_index"].tolist() == [list(range(TOKENS))] * 2
    assert "tokens.token_index" not in found


def test_contracts_are_per_output(model: Encoder, inputs: dict[str, Tensor]) -> None:
    found, (space,) = _reduced(model, inputs, _policy("prune", {"scores": "reduced", "*": "full"}))
    assert list(found) == ["tokens", "scores", "cls", "hidden", "scores.token_index"]
    assert found["tokens"].shape[1] == TOKENS
    cut, kept = _by_hand(model, inputs["x"], space.index)
    torch.testing.assert_close(found["scores"], model.finish(kept)["scores"], rtol=1e-4, atol=1e-5)
    full = model.finish(cut.scatter(1, space.index[..., None].expand_as(kept), kept))
    torch.testing.assert_close(found["tokens"], full["tokens"], rtol=1e-4, atol=1e-5)


def test_a_cut_at_the_end_is_restored_behind_the_norm_and_the_head(model: Encoder, inputs: dict[str, Tensor]) -> None:
    """Nothing lies between the cut and the outputs: what was dropped is normed and projected as well."""
    policy = _policy("prune", layer=2)
    policy["steps"][0]["at"] = {"layers": [2], "site": "block_output"}
    found, _ = _reduced(model, inputs, policy)
    with torch.no_grad():
        whole = model(inputs["x"])
    for name, value in whole.items():
        torch.testing.assert_close(found[name], value, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("contract", ["last_token", {"rows": [0, 2]}])
def test_rows_of_the_full_output(model: Encoder, inputs: dict[str, Tensor], contract: Any) -> None:
    full, _ = _reduced(model, inputs, _policy("merge"))
    found, _ = _reduced(model, inputs, _policy("merge", {"scores": contract}))
    rows = [-1] if contract == "last_token" else contract["rows"]
    torch.testing.assert_close(found["scores"], full["scores"][:, rows], rtol=1e-4, atol=1e-5)


def test_an_output_that_is_not_there_is_refused(model: Encoder, inputs: dict[str, Tensor]) -> None:
    with pytest.raises(PlanError, match="no output `score`") as caught:
        reduce_program(trace(model, inputs), _policy("prune", {"score": "full"}))
    assert caught.value.help == "did you mean `scores`?"


@pytest.mark.parametrize("name", ["torch_encoder_nbc_post", "torch_encoder_nbc_pre"])
@pytest.mark.parametrize("node", ["prune", "merge"])
def test_outputs_with_tokens_in_front(name: str, node: str) -> None:
    """``[N, B, C]`` in, ``[N, B, C]`` out; post-norm: what was dropped is not normed again."""
    entry = ZOO[name]
    inputs = entry.inputs(2)
    inputs["src_key_padding_mask"] = torch.zeros_like(inputs["src_key_padding_mask"])
    program = trace(entry.build(), inputs)
    full, _ = reduce_program(program, _policy(node))
    short, _ = reduce_program(program, _policy(node, {"*": "reduced"}))
    (whole,), (kept, places) = run_program(full, inputs), run_program(short, inputs)
    assert whole.shape == run_program(program, inputs)[0].shape
    wide, narrow = whole.transpose(0, 1), kept.transpose(0, 1)
    if node == "merge":
        torch.testing.assert_close(wide, _rows(narrow, places), rtol=1e-4, atol=1e-5)
    else:
        torch.testing.assert_close(_rows(wide, places), narrow, rtol=1e-4, atol=1e-5)
        gone = torch.ones(wide.shape[:2], dtype=torch.bool).scatter(1, places, False)
        # Unit variance tells a post-norm stream that was left alone from zeros.
        assert wide[gone].var(-1).min() > 0.1
