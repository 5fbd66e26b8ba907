"""What lies next to a decoder's engine: configuration and tokenizer, and nothing that runs."""

from __future__ import annotations

import json
import pickle
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from torch import nn

from tests.decoders.bundles import compiled, model_folder
from tests.decoders.tiny import model_of
from tokcc.backends.runtime_files import save_runtime_files, stop_tokens
from tokcc.capture.hf_decoder import CausalDecoder
from tokcc.capture.load import load
from tokcc.capture.loaded import Loaded
from tokcc.errors import LoadError

COPIED = {"config.json", "generation_config.json", "tokenizer.json", "tokenizer_config.json"}


@pytest.fixture
def model(tmp_path: Path) -> Path:
    return model_folder(tmp_path / "m")


@pytest.fixture
def out(tmp_path: Path) -> Path:
    (tmp_path / "out").mkdir()
    return tmp_path / "out"


def loaded(folder: Path, module: nn.Module | None = None) -> Loaded:
    return Loaded(str(folder), module=module or CausalDecoder(nn.Linear(1, 1)), task="text-generation")


def names(folder: Path) -> set[str]:
    return {path.name for path in folder.iterdir()}


class TestFromAFolder:
    def test_files_are_copied_as_they_are(self, model: Path, out: Path) -> None:
        assert save_runtime_files(loaded(model), out) == ()
        assert names(out) == COPIED
        assert all((out / name).read_bytes() == (model / name).read_bytes() for name in COPIED)
        transformers.AutoConfig.from_pretrained(out, local_files_only=True)
        transformers.AutoTokenizer.from_pretrained(out, local_files_only=True)

    def test_no_code_no_weights_no_pickles(self, model: Path, out: Path) -> None:
        (model / "modeling_own.py").write_text("raise SystemExit")
        (model / "tokenizer.model").write_bytes(pickle.dumps({"a": 1}, protocol=4))
        torch.save({}, model / "vocab.txt")
        (model / "training_args.bin").write_bytes(b"x")
        remarks = save_runtime_files(loaded(model), out)
        assert names(out) == COPIED
        assert sorted(remark.split()[0] for remark in remarks) == ["tokenizer.model", "vocab.txt"]

    def test_references_to_code_go(self, model: Path, out: Path) -> None:
        config = json.loads((model / "config.json").read_text())
        (model / "config.json").write_text(json.dumps({**config, "auto_map": {"AutoConfig": "modeling_own.Config"}}))
        (remark,) = save_runtime_files(loaded(model), out)
        assert "auto_map" in remark
        assert json.loads((out / "config.json").read_text()) == config

    def test_no_tokenizer_is_said(self, tmp_path: Path, out: Path) -> None:
        (remark,) = save_runtime_files(loaded(model_folder(tmp_path / "bare", tokenizer=False)), out)
        assert "no tokenizer" in remark
        assert names(out) == {"config.json", "generation_config.json"}

    def test_links_into_a_download_cache_become_files(self, model: Path, out: Path) -> None:
        (model / "tokenizer.json").rename(model.parent / "blob")
        (model / "tokenizer.json").symlink_to(model.parent / "blob")
        save_runtime_files(loaded(model), out)
        assert not (out / "tokenizer.json").is_symlink()
        assert (out / "tokenizer.json").read_bytes() == (model.parent / "blob").read_bytes()

    def test_a_damaged_file(self, model: Path, out: Path) -> None:
        (model / "tokenizer_config.json").write_text("{")
        with pytest.raises(LoadError, match=r"tokenizer_config\.json cannot be read"):
            save_runtime_files(loaded(model), out)

    def test_other_models_bring_nothing(self, model: Path, out: Path) -> None:
        assert save_runtime_files(loaded(model, nn.Linear(1, 1)), out) == ()
        assert save_runtime_files(Loaded("LlamaForCausalLM", module=CausalDecoder(nn.Linear(1, 1))), out) == ()
        assert names(out) == set()


class TestFromGguf:
    @pytest.fixture
    def gguf(self, tmp_path: Path) -> Path:
        folder = tmp_path / "gguf"
        folder.mkdir()
        (folder / "m.gguf").touch()
        return folder

    def test_what_transformers_writes(
        self, gguf: Path, model: Path, out: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        original = transformers.AutoTokenizer.from_pretrained

        def from_gguf(folder: str, *, gguf_file: str, **options: Any) -> Any:
            assert (folder, gguf_file, options["trust_remote_code"]) == (str(gguf), "m.gguf", False)
            return original(model, local_files_only=True)

        monkeypatch.setattr(transformers.AutoTokenizer, "from_pretrained", from_gguf)
        decoder: Any = model_of("llama", "sdpa")
        monkeypatch.setattr(decoder.config, "quantization_config", {"quant_method": "gguf"}, raising=False)
        assert save_runtime_files(loaded(gguf, CausalDecoder(decoder)), out) == ()
        assert names(out) >= COPIED
        assert "quantization_config" not in json.loads((out / "config.json").read_text())
        settings = json.loads((out / "tokenizer_config.json").read_text())
        assert settings["tokenizer_class"] == "PreTrainedTokenizerFast"
        assert original(out, local_files_only=True)("w5 w6")["input_ids"] == [5, 6]

    def test_a_tokenizer_that_transformers_cannot_read(
        self, gguf: Path, out: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        def fails(*args: Any, **options: Any) -> Any:
            raise ValueError("unknown architecture")

        monkeypatch.setattr(transformers.AutoTokenizer, "from_pretrained", fails)
        remarks = save_runtime_files(loaded(gguf, CausalDecoder(model_of("llama", "sdpa"))), out)
        assert "unknown architecture" in remarks[0]
        assert "no tokenizer" in remarks[1]


class TestStopTokens:
    @pytest.mark.parametrize(
        ("files", "wanted"),
        [
            ({}, ()),
            ({"config.json": {"eos_token_id": 2}}, (2,)),
            ({"config.json": {"eos_token_id": 2}, "generation_config.json": {"eos_token_id": [7, 2]}}, (7, 2)),
            ({"config.json": {"eos_token_id": 2}, "generation_config.json": {}}, (2,)),
            ({"config.json": {"eos_token_id": None}}, ()),
            ({"config.json": []}, ()),
            ({"config.json": "{"}, ()),
        ],
    )
    def test_they_are_read(self, tmp_path: Path, files: dict[str, Any], wanted: tuple[int, ...]) -> None:
        for name, content in files.items():
            (tmp_path / name).write_text(content if isinstance(content, str) else json.dumps(content))
        assert stop_tokens(tmp_path) == wanted


def test_a_compiled_bundle_holds_them(model: Path, tmp_path: Path) -> None:
    bundle = compiled(model, tmp_path / "b", "tova")
    assert set(bundle.manifest.files) >= COPIED
    bundle.verify()
    with pytest.raises(LoadError, match="a bundle that tokcc wrote"):
        load(bundle.path)
    assert stop_tokens(bundle.path) == (2,)
