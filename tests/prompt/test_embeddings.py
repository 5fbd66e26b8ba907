"""Decoders that take embeddings: an input says which tokens are the image; positions may have three axes."""

from __future__ import annotations

import functools
import warnings
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import transformers
from torch import Tensor

from tests.prompt.engine import PADDING, PROMPT, TOKENS, build, visual_policy
from tests.prompt.models import IMAGE, LAYERS, model_of, prompts
from tests.prompt.oracle import Cut, run
from tests.prompt.test_fastv import rule
from tokcc.analysis.cache_sites import cache_sites
from tokcc.capture.export import clean
from tokcc.capture.vlm.parts import EmbeddedDecoder, embedded_dynamic, embedded_inputs
from tokcc.config import load_policy
from tokcc.errors import PlanError
from tokcc.ir.program import Program
from tokcc.passes.cache.planning import make_cache_plan
from tokcc.passes.methods import library

POLICY = visual_policy({"preset": "fastv"})


def captured(model: Any, *, grid: bool) -> Program:
    decoder = EmbeddedDecoder(model, grid=grid).eval()
    inputs = embedded_inputs(decoder, torch.float32)
    with torch.no_grad(), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        exported = torch.export.export(
            decoder, (), inputs, dynamic_shapes=embedded_dynamic(inputs), strict=False
        ).run_decompositions({})
    return clean(Program.from_exported(exported))


@functools.cache
def qwen2_vl(attention: str) -> Any:
    """A text model of Qwen2-VL whose positions have frame, row and column."""
    config = transformers.Qwen2VLConfig(
        text_config={
            "vocab_size": 97,
            "hidden_size": 32,
            "intermediate_size": 48,
            "num_hidden_layers": 3,
            "num_attention_heads": 4,
            "num_key_value_heads": 2,
            "max_position_embeddings": 512,
            "rope_scaling": {"type": "mrope", "mrope_section": [1, 1, 2]},
            "bos_token_id": 1,
            "eos_token_id": 2,
        },
        vision_config={"depth": 1, "embed_dim": 16, "num_heads": 2, "hidden_size": 32, "patch_size": 4},
    )
    torch.manual_seed(0)
    model = transformers.Qwen2VLForConditionalGeneration._from_config(config, attn_implementation=attention)
    with torch.no_grad():
        for parameter in model.model.language_model.parameters():
            if parameter.ndim == 2:
                parameter.mul_(4.0)
    return model.eval()


def feeds_of(session: Any, embeds: Tensor, mask: Tensor, places: Tensor, ids: Tensor) -> list[Tensor]:
    """Run a prompt and single tokens; logits of each call."""
    past: dict[str, Any] = {}
    for item in session.get_inputs():
        if "past" in item.name:
            past[item.name] = np.zeros((len(ids), item.shape[1], 0, item.shape[3]), np.float32)
    names, found = [item.name for item in session.get_outputs()], []
    for start, stop in [(0, PROMPT), *((i, i + 1) for i in range(PROMPT, ids.shape[1]))]:
        feeds = {
            "inputs_embeds": embeds[:, start:stop].numpy(),
            "attention_mask": mask[:, :stop].numpy(),
            "position_ids": places[..., start:stop].numpy(),
            "image_mask": (ids[:, start:stop] == IMAGE).long().numpy(),
            **past,
        }
        results = dict(zip(names, session.run(None, feeds), strict=True))
        past = {name: results[name.replace("past_key_values", "present")] for name in past}
        found.append(torch.from_numpy(results["logits"]))
    return found


def test_an_input_says_which_tokens_are_the_image(tmp_path: Path) -> None:
    engine = build("llama", POLICY, tmp_path, captured(model_of("llama", "sdpa"), grid=False))
    assert [(spec.name, spec.shape) for spec in engine.plan.inputs] == [("image_mask", ("B", "S"))]
    ids, mask = prompts(PADDING, PROMPT, PROMPT + 5, TOKENS)
    model = model_of("llama")
    with torch.no_grad():
        embeds = model.get_input_embeddings()(ids)
    places = (mask.cumsum(1) - 1).clamp(min=0)
    logits = torch.cat(feeds_of(engine.session, embeds, mask, places, ids), 1)
    for row, count in enumerate(PADDING):
        alone = run(model, ids[row, count:], PROMPT - count, [Cut(1, rule(TOKENS // 2))]).logits
        scale = float(alone.abs().max())
        np.testing.assert_allclose(logits[row, count:].numpy(), alone.numpy(), rtol=0, atol=2e-4 * scale)
    assert len(engine.plan.sites) == LAYERS


def grid_places(length: int) -> Tensor:
    """Positions as Qwen counts them: text by one, an image of 4 x 4 tokens by row and column, ``[3, 1, T]``."""
    before, side = 2, 4
    text = torch.arange(before).expand(3, -1)
    frame = torch.full((side * side,), before)
    row, column = (torch.arange(side * side) // side + before), (torch.arange(side * side) % side + before)
    behind = torch.arange(length - before - side * side) + before + side
    return torch.cat([text, torch.stack([frame, row, column]), behind.expand(3, -1)], 1)[:, None]


def test_positions_of_three_axes_are_kept(tmp_path: Path) -> None:
    """Equal to the whole model with hidden keys; the row alone, since rows of a batch begin at other places."""
    step = {"preset": "fastv", "layer": 0}
    engine = build("qwen2-vl", visual_policy(step), tmp_path, captured(qwen2_vl("sdpa"), grid=True))
    ids, mask = prompts((0,), PROMPT, PROMPT + 5, TOKENS)
    model = qwen2_vl("eager")
    with torch.no_grad():
        embeds = model.get_input_embeddings()(ids)
    places = grid_places(ids.shape[1])
    logits = torch.cat(feeds_of(engine.session, embeds, mask, places, ids), 1)[0]
    decoder, total = model.get_decoder(), ids.shape[1]
    with torch.no_grad():
        whole = decoder(inputs_embeds=embeds, position_ids=places, output_attentions=True)
        row = whole.attentions[0][0, :, PROMPT - 1].mean(0)
        image = [j for j in range(PROMPT) if int(ids[0, j]) == IMAGE]
        gone = sorted(image, key=lambda j: (-float(row[j]), j))[TOKENS // 2 :]
        slot = torch.arange(total)
        hidden = torch.zeros(total, dtype=torch.bool)
        hidden[gone] = True
        seen = (slot <= slot[:, None]) & ~hidden | (slot == slot[:, None])
        additive = torch.zeros(seen.shape).masked_fill(~seen, torch.finfo(torch.float32).min)[None, None]
        hooks = [
            layer.register_forward_pre_hook(
                lambda m, args, kwargs: (args, {**kwargs, "attention_mask": additive}), with_kwargs=True
            )
            for layer in decoder.layers[1:]
        ]
        wanted = model.get_output_embeddings()(decoder(inputs_embeds=embeds, position_ids=places).last_hidden_state)[0]
        for hook in hooks:
            hook.remove()
    rows = [j for j in range(total) if j not in gone]
    scale = float(wanted.abs().max())
    np.testing.assert_allclose(logits[rows].numpy(), wanted[rows].numpy(), rtol=0, atol=2e-4 * scale)


def test_positions_of_three_axes_are_not_counted_anew() -> None:
    program = captured(qwen2_vl("sdpa"), grid=True)
    wanted = visual_policy({"preset": "fastv", "layer": 0, "positions": "compact"})
    with pytest.raises(PlanError, match="more than one axis"):
        make_cache_plan(load_policy(wanted, presets=library()), program, cache_sites(program))
