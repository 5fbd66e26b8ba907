"""optimum's `ORTModelForCausalLM`, unmodified, generates from a bundle's folder what our own loop generates.

optimum-onnx wants a transformers of the 4 series, so it runs in an environment of its own (`.runtimes/optimum`).
"""

from __future__ import annotations

import importlib.metadata
from pathlib import Path

import pytest
import torch

from tests.decoders.bundles import CAPACITY, POLICIES, compiled, model_folder
from tests.decoders.environments import environment, run_driver
from tests.decoders.tiny import VOCABULARY
from tokcc.backends.generation import Generator

pytestmark = [pytest.mark.slow, pytest.mark.timeout(1200)]

DRIVER = Path(__file__).parent / "drivers" / "optimum_generate.py"
NEW = 30


@pytest.fixture(scope="module")
def optimum() -> Path:
    """The Python of an environment with optimum and the torch that we have."""
    torch_here = f"torch=={importlib.metadata.version('torch')}"
    return environment("optimum", ["optimum-onnx[onnxruntime]==0.1.*", torch_here])


def prompts() -> list[list[int]]:
    """Longer than the capacity, about as long, and shorter: the batch is padded on the left."""
    generator = torch.Generator().manual_seed(5)
    lengths = (3 * CAPACITY, CAPACITY + 1, CAPACITY // 2)
    return [(torch.randperm(VOCABULARY - 3, generator=generator)[:n] + 3).tolist() for n in lengths]


def test_optimum_generates_what_our_loop_generates(optimum: Path, tmp_path: Path) -> None:
    folder = model_folder(tmp_path / "m")
    bundles = {name: compiled(folder, tmp_path / name, policy) for name, policy in POLICIES.items()}
    job = {"prompts": prompts(), "new": NEW, "folders": {name: str(bundle.path) for name, bundle in bundles.items()}}
    answer = run_driver(optimum, DRIVER, job, tmp_path, HF_HUB_OFFLINE="1")
    assert answer["versions"]["transformers"].startswith("4."), answer["versions"]
    texts = {}
    for name, bundle in bundles.items():
        # `min_new_tokens` keeps transformers from choosing the token that ends a text, so ours must not come to it.
        texts[name] = Generator(bundle).generate(prompts(), max_new_tokens=NEW, stop=())
        assert not any(2 in row for row in texts[name]), "choose prompts after which the model does not end the text"
        assert answer["tokens"][name] == texts[name], name
        bundle.verify()
    assert len({str(text) for text in texts.values()}) == len(texts)  # every policy has its say
