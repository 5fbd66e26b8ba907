"""Mamba with its states as inputs and outputs, against transformers with its own cache."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from tests.decoders.mamba import LAYERS, engine, mamba, padded, program, read
from tokcc.analysis.state_sites import seen_tokens, state_sites
from tokcc.backends.generation.decoder import DecoderEngine
from tokcc.backends.generation.loop import Generator
from tokcc.errors import UsageError
from tokcc.pipeline.inspection import Inspection

NEW = 64


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> DecoderEngine:
    return engine("none", tmp_path_factory.mktemp("whole"))


def close(got: Tensor, wanted: Tensor) -> None:
    """Equal up to rounding in fp32, at the scale of the values."""
    torch.testing.assert_close(got, wanted, rtol=0, atol=2e-5 * float(wanted.abs().max()))


@pytest.mark.parametrize(("rows", "prompt", "padding"), [(1, 9, 0), (3, 9, 4), (1, 1, 0), (2, 3, 2)])
def test_a_prompt_and_single_tokens_equal_transformers(
    whole: DecoderEngine, rows: int, prompt: int, padding: int
) -> None:
    model = mamba()
    ids, mask = padded(rows, prompt + NEW, padding)
    cache, start = None, 0
    for logits, states in read(whole, ids, mask, [prompt] + [1] * NEW):
        stop = start + logits.shape[1]
        with torch.no_grad():
            wanted = model(
                ids[:, start:stop],
                attention_mask=None if start else mask[:, :stop],
                cache_params=cache,
                use_cache=True,
            )
        cache = wanted.cache_params
        real = mask[:, start:stop].bool()
        close(logits[real], wanted.logits[real])
        for i in range(LAYERS):
            for name, kept in (("conv_state", "conv_states"), ("ssm_state", "recurrent_states")):
                want = getattr(cache.layers[i], kept)[0]
                close(states[f"past_key_values.{i}.{name}"], want)
        start = stop
    assert start == prompt + NEW


def test_what_a_state_holds_matters(whole: DecoderEngine) -> None:
    """The comparison above would say little if the logits came from the last tokens alone."""
    ids, mask = padded(1, 12)
    other = ids.clone()
    other[:, :4] = (other[:, :4] + 1) % 90 + 3
    first, second = (next(read(whole, x, mask, [12]))[0][:, -1] for x in (ids, other))
    assert (first - second).abs().max() > 0.05 * first.abs().max()


def test_a_text_may_come_in_pieces(whole: DecoderEngine) -> None:
    ids, mask = padded(3, 24, 3)
    apart = torch.cat([logits for logits, _ in read(whole, ids, mask, [10, 6, 1, 7])], 1)
    together = torch.cat([logits for logits, _ in read(whole, ids, mask, [24])], 1)
    real = mask.bool()
    close(apart[real], together[real])


def test_the_loop_generates_what_transformers_does(whole: DecoderEngine) -> None:
    ids, _ = padded(1, 7)
    with torch.no_grad():
        wanted = mamba().generate(ids, max_new_tokens=12, do_sample=False, eos_token_id=None, pad_token_id=0)
    stream = Generator(whole).stream([ids[0].tolist()], max_new_tokens=12)
    assert stream.finish() == [wanted[0, 7:].tolist()]


def test_states_of_other_sizes_are_refused(whole: DecoderEngine) -> None:
    ids, mask = (x.numpy() for x in padded(1, 3))
    past = whole.empty_past(2)
    with pytest.raises(UsageError, match="does not fit"):
        whole.call(ids, mask, mask, past)


def test_the_sites() -> None:
    sites = state_sites(program())
    assert [(site.layer, site.channels, site.past) for site in sites] == [
        (i, 32, f"past_key_values_{i}_ssm_state") for i in range(LAYERS)
    ]
    names = list(program().output_names)
    assert [names[site.present] for site in sites] == [f"present.{i}.ssm_state" for i in range(LAYERS)]
    assert seen_tokens(program(), sites) == "attention_mask"


def test_it_is_inspected() -> None:
    found = Inspection("mamba", program(), None, scans=state_sites(program())).to_dict()
    assert found["kind"] == "state-space decoder"
    assert found["layers"] == [{"layer": i, "channels": 32, "state": 4} for i in range(LAYERS)]
    assert not any(row["fits"] for row in found["presets"])  # thresholds have to be measured first
    assert "past_key_values.1.conv_state" in found["inputs"]
    assert "present.1.ssm_state" in found["outputs"]
