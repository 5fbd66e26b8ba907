"""onnxruntime-genai, unmodified, generates from a bundle's folder what our own loop and transformers generate.

Its onnxruntime need not be ours, so it runs in an environment of its own (`.runtimes/genai`).
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from tests.decoders.bundles import CAPACITY, compiled, model_folder
from tests.decoders.environments import environment, run_driver
from tests.decoders.methods import test_h2o as h2o
from tests.decoders.methods import test_tova as tova
from tests.decoders.oracle import Rule, run_alone
from tests.decoders.tiny import VOCABULARY, model_of
from tokcc.backends.generation import Generator

pytestmark = [pytest.mark.slow, pytest.mark.timeout(1200)]

DRIVER = Path(__file__).parent / "drivers" / "genai_generate.py"
NEW = 30


def policy(preset: str | None, **keys: Any) -> dict[str, Any]:
    steps = [{"preset": preset, "tokens": CAPACITY}] if preset else []
    return {"version": 1, "name": str(preset), "steps": steps, "kv": {"layout": "slots"}, **keys}


# Family, policy, rule of the oracle.
CASES: dict[str, tuple[str, dict[str, Any], Rule | None]] = {
    "h2o": ("llama", policy("h2o"), h2o.rule(CAPACITY, CAPACITY // 2)),
    "tova": ("llama", policy("tova"), tova.rule(CAPACITY)),
    "tova, last row": ("llama", policy("tova", outputs={"logits": "last_token"}), tova.rule(CAPACITY)),
    "keyformer": ("llama", policy("keyformer"), None),
    "streaming-llm": ("llama", policy("streaming-llm"), None),
    "gpt2": ("gpt2", policy("tova"), tova.rule(CAPACITY)),
    "windows": ("mistral", policy(None), None),
}


def prompts() -> list[list[list[int]]]:
    """Alone and longer than the capacity, two of one length, and a batch that has to be padded."""
    generator = torch.Generator().manual_seed(45)
    lengths = ((3 * CAPACITY,), (CAPACITY + 1, CAPACITY + 1), (3 * CAPACITY, CAPACITY + 1, CAPACITY // 2))
    return [[(torch.randperm(VOCABULARY - 3, generator=generator)[:n] + 3).tolist() for n in rows] for rows in lengths]


def by_oracle(family: str, prompt: list[int], made: list[int], rule: Rule) -> list[int]:
    """What transformers finds most probable at each place of a text, with the rule's cache."""
    trace = run_alone(model_of(family), torch.tensor([*prompt, *made[:-1]]), (len(prompt), *[1] * (NEW - 1)), rule)
    return trace.logits[len(prompt) - 1 :].argmax(1).tolist()


def test_genai_generates_what_our_loop_generates(tmp_path: Path) -> None:
    python = environment("genai", ["onnxruntime-genai==0.18.0", "numpy"])
    models = {
        family: model_folder(tmp_path / "models" / family, family)
        for family in {family for family, _, _ in CASES.values()}
    }
    bundles = {name: compiled(models[family], tmp_path / name, given) for name, (family, given, _) in CASES.items()}
    folders = {name: str(bundle.path) for name, bundle in bundles.items()}
    job = {"batches": prompts(), "new": NEW, "folders": folders, "beams": folders["tova"]}
    answer = run_driver(python, DRIVER, job, tmp_path)
    assert answer["versions"]["onnxruntime-genai"] == "0.18.0"
    assert "Beam search" in answer["beams"]
    for name, bundle in bundles.items():
        family, _, rule = CASES[name]
        generator = Generator(bundle)
        own = [generator.generate(rows, max_new_tokens=NEW, stop=()) for rows in prompts()]
        # `min_length` keeps genai from choosing the token that ends a text, so ours must not come to it.
        assert not any(2 in row for rows in own for row in rows), f"{name}: choose other prompts"
        assert answer["tokens"][name] == own, name
        if rule is not None:
            for prompt, made in zip(prompts()[-1], own[-1], strict=True):
                assert by_oracle(family, prompt, made, rule) == made, name
        bundle.verify()
