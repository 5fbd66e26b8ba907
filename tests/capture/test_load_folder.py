"""Hugging Face folders: tasks, named inputs and outputs, default shapes, and what is refused."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from tokcc.capture.load import Loaded, load
from tokcc.errors import CaptureError, LoadError, UsageError

transformers = pytest.importorskip("transformers")

pytestmark = pytest.mark.filterwarnings(r"ignore:.isinstance\(treespec, LeafSpec\):FutureWarning")

SMALL: dict[str, Any] = {
    "hidden_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "intermediate_size": 48,
}
IMAGE = {**SMALL, "image_size": 16, "patch_size": 8}
TEXT = {**SMALL, "vocab_size": 40, "max_position_embeddings": 24}


def _axes(loaded: Loaded, name: str) -> dict[int, Any]:
    assert loaded.dynamic_shapes is not None
    axes: dict[int, Any] = loaded.dynamic_shapes[name]
    return axes


def _save(folder: Path, model: str, config: str, arguments: dict[str, Any], **kwargs: Any) -> Path:
    torch.manual_seed(0)
    made = getattr(transformers, model)(getattr(transformers, config)(**arguments), **kwargs)
    made.save_pretrained(folder)
    return folder


def _edit(folder: Path, **changes: Any) -> Path:
    path = folder / "config.json"
    config = {**json.loads(path.read_text()), **changes}
    path.write_text(json.dumps({key: value for key, value in config.items() if value is not None}))
    return folder


@pytest.fixture
def vit(tmp_path: Path) -> Path:
    return _save(tmp_path / "vit", "ViTForImageClassification", "ViTConfig", {**IMAGE, "num_labels": 3})


@pytest.fixture
def bert(tmp_path: Path) -> Path:
    return _save(tmp_path / "bert", "BertModel", "BertConfig", TEXT)


def test_image_classifier(vit: Path, capfd: pytest.CaptureFixture[str]) -> None:
    (vit / "preprocessor_config.json").write_text("{}")
    loaded = load(vit)
    assert loaded.task == "image-classification"
    assert loaded.preprocessor == vit
    assert loaded.label_names == ("LABEL_0", "LABEL_1", "LABEL_2")
    assert loaded.example_kwargs["pixel_values"].shape == (2, 3, 16, 16)
    assert list(_axes(loaded, "pixel_values")) == [0]
    assert loaded.module is not None
    out = loaded.module(**loaded.example_kwargs)
    reference = transformers.ViTForImageClassification.from_pretrained(vit).eval()
    capfd.readouterr()
    load(vit)
    assert capfd.readouterr() == ("", "")  # no progress bars, no load report
    torch.testing.assert_close(out["logits"], reference(**loaded.example_kwargs).logits, rtol=0, atol=1e-6)


@pytest.mark.parametrize(
    ("model", "config", "arguments", "task", "inputs", "outputs"),
    [
        (
            "ViTModel",
            "ViTConfig",
            IMAGE,
            "feature-extraction",
            ["pixel_values"],
            ["last_hidden_state", "pooler_output"],
        ),
        (
            "BertModel",
            "BertConfig",
            TEXT,
            "feature-extraction",
            ["input_ids", "attention_mask", "token_type_ids"],
            ["last_hidden_state", "pooler_output"],
        ),
        (
            "RobertaForSequenceClassification",
            "RobertaConfig",
            {**TEXT, "type_vocab_size": 1},
            "text-classification",
            ["input_ids", "attention_mask"],
            ["logits"],
        ),
        (
            "BertForMaskedLM",
            "BertConfig",
            TEXT,
            "fill-mask",
            ["input_ids", "attention_mask", "token_type_ids"],
            ["logits"],
        ),
        (
            "DistilBertForQuestionAnswering",
            "DistilBertConfig",
            {"vocab_size": 40, "max_position_embeddings": 24, "dim": 32, "n_layers": 1, "n_heads": 2, "hidden_dim": 32},
            "question-answering",
            ["input_ids", "attention_mask"],
            ["start_logits", "end_logits"],
        ),
        (
            "ASTForAudioClassification",
            "ASTConfig",
            {**SMALL, "max_length": 32, "num_mel_bins": 16, "patch_size": 8},
            "audio-classification",
            ["input_values"],
            ["logits"],
        ),
        (
            "VideoMAEForVideoClassification",
            "VideoMAEConfig",
            {**IMAGE, "num_frames": 4},
            "video-classification",
            ["pixel_values"],
            ["logits"],
        ),
        (
            "CLIPVisionModelWithProjection",
            "CLIPVisionConfig",
            {**IMAGE, "projection_dim": 12},
            "image-feature-extraction",
            ["pixel_values"],
            ["image_embeds", "last_hidden_state"],
        ),
    ],
)
def test_inferred_tasks_export(
    tmp_path: Path,
    model: str,
    config: str,
    arguments: dict[str, Any],
    task: str,
    inputs: list[str],
    outputs: list[str],
) -> None:
    loaded = load(_save(tmp_path / "m", model, config, arguments))
    assert (loaded.task, list(loaded.example_kwargs)) == (task, inputs)
    assert loaded.module is not None
    program = torch.export.export(
        loaded.module, (), loaded.example_kwargs, dynamic_shapes=loaded.dynamic_shapes, strict=False
    )
    names = [node.name for node in program.graph.nodes if node.op == "placeholder"]
    assert names[-len(inputs) :] == inputs
    single = {name: value[:1] for name, value in loaded.example_kwargs.items()}
    found, expected = program.module()(**single), loaded.module(**single)
    assert list(found) == list(expected) == outputs
    for name in outputs:
        torch.testing.assert_close(found[name], expected[name], rtol=0, atol=1e-5)


def test_text_defaults(bert: Path) -> None:
    loaded = load(bert)
    ids, mask = loaded.example_kwargs["input_ids"], loaded.example_kwargs["attention_mask"]
    assert ids.shape == (2, 24)  # 128, limited by the position table
    assert mask[0].all()
    assert not mask[1].all()
    assert int(ids.max()) < 40
    assert ids[1][mask[1] == 0].eq(0).all()
    sequence = _axes(loaded, "input_ids")[1]
    assert (sequence.min, sequence.max) == (1, 24)
    assert _axes(loaded, "attention_mask")[1] is sequence


def test_roberta_positions_start_after_the_padding_id(tmp_path: Path) -> None:
    folder = _save(tmp_path / "m", "RobertaModel", "RobertaConfig", {**TEXT, "pad_token_id": 1})
    assert load(folder).example_kwargs["input_ids"].shape == (2, 22)


def test_one_text_input_is_enough(bert: Path) -> None:
    loaded = load(bert, inputs=["input_ids=int64[3,10]"])
    assert {tuple(value.shape) for value in loaded.example_kwargs.values()} == {(3, 10)}
    assert loaded.dynamic_shapes is not None


def test_batch_of_one_stays_static(vit: Path) -> None:
    assert load(vit, inputs=["pixel_values=fp32[1,3,16,16]"]).dynamic_shapes is None
    assert load(vit, example_inputs={"pixel_values": torch.zeros(1, 3, 16, 16)}).dynamic_shapes is None
    assert load(vit, example_inputs=torch.zeros(4, 3, 16, 16)).dynamic_shapes is not None
    assert load(vit, dynamic_shapes={}).dynamic_shapes is None


def test_image_size_of_the_processor_counts_first(tmp_path: Path) -> None:
    folder = _save(tmp_path / "m", "Dinov2Model", "Dinov2Config", {**IMAGE, "image_size": 32})
    settings = {"size": {"shortest_edge": 32}, "crop_size": {"height": 16, "width": 16}}
    (folder / "preprocessor_config.json").write_text(json.dumps(settings))
    assert load(folder).example_kwargs["pixel_values"].shape == (2, 3, 16, 16)


def test_dtype(vit: Path) -> None:
    loaded = load(vit, dtype="bf16")
    assert loaded.module is not None
    assert next(loaded.module.parameters()).dtype == torch.bfloat16
    assert loaded.example_kwargs["pixel_values"].dtype == torch.bfloat16
    (vit / "model.safetensors").rename(vit / "kept")
    transformers.ViTForImageClassification(transformers.ViTConfig(**IMAGE)).half().save_pretrained(vit)
    loaded = load(vit)
    assert loaded.module is not None
    assert next(loaded.module.parameters()).dtype == torch.float32  # fp32 unless asked for


def test_pooler_without_weights_is_left_out(tmp_path: Path) -> None:
    folder = _save(tmp_path / "m", "ViTModel", "ViTConfig", IMAGE, add_pooling_layer=False)
    loaded = load(folder)
    assert loaded.module is not None
    assert list(loaded.module(**loaded.example_kwargs)) == ["last_hidden_state"]


def test_two_towers(tmp_path: Path) -> None:
    arguments = {"vision_config": IMAGE, "text_config": {**TEXT, "eos_token_id": 2}, "projection_dim": 12}
    folder = _save(tmp_path / "clip", "CLIPModel", "CLIPConfig", arguments)
    with pytest.raises(LoadError, match="image-feature-extraction"):
        load(folder)
    loaded = load(folder, task="image-feature-extraction")
    assert loaded.module is not None
    out = loaded.module(**loaded.example_kwargs)
    full = transformers.CLIPModel.from_pretrained(folder).eval()
    expected = full.visual_projection(full.vision_model(**loaded.example_kwargs).pooler_output)
    torch.testing.assert_close(out["image_embeds"], expected, rtol=0, atol=1e-5)
    text = load(folder, task="feature-extraction")
    assert list(text.example_kwargs) == ["input_ids", "attention_mask"]


def test_whisper_is_loaded_as_its_encoder(tmp_path: Path) -> None:
    arguments = {
        "vocab_size": 40,
        "num_mel_bins": 8,
        "d_model": 32,
        "encoder_layers": 1,
        "decoder_layers": 1,
        "encoder_attention_heads": 2,
        "decoder_attention_heads": 2,
        "encoder_ffn_dim": 32,
        "decoder_ffn_dim": 32,
        "max_source_positions": 16,
        "max_target_positions": 8,
        "pad_token_id": 0,
        "bos_token_id": 1,
        "eos_token_id": 2,
        "decoder_start_token_id": 1,
    }
    folder = _save(tmp_path / "m", "WhisperForConditionalGeneration", "WhisperConfig", arguments)
    with pytest.raises(LoadError, match="feature-extraction"):
        load(folder)
    loaded = load(folder, task="feature-extraction")
    assert loaded.module is not None
    assert loaded.example_kwargs["input_features"].shape == (2, 8, 32)
    assert loaded.module(**loaded.example_kwargs)["last_hidden_state"].shape == (2, 16, 32)


# --- refusals


def _refused(folder: Path, **kwargs: Any) -> LoadError:
    with pytest.raises(LoadError) as caught:
        load(folder, **kwargs)
    return caught.value


def test_task_that_does_not_fit(vit: Path) -> None:
    error = _refused(vit, task="text-classification")
    assert "does not do text-classification" in error.what
    assert "image-classification" in (error.needed or "")
    assert "did you mean image-classification?" in (_refused(vit, task="image-clasification").help or "")


def test_head_that_would_be_random(bert: Path) -> None:
    error = _refused(bert, task="text-classification")
    assert "would be random" in error.what
    assert "classifier" in (error.needed or "")


def test_decoder(tmp_path: Path) -> None:
    arguments = {**TEXT, "num_key_value_heads": 2}
    folder = _save(tmp_path / "m", "LlamaForCausalLM", "LlamaConfig", arguments)
    loaded = load(folder)
    assert loaded.task == "text-generation"
    assert list(loaded.example_kwargs) == ["input_ids", "attention_mask", "position_ids", "past_key_values"]
    layer = loaded.example_kwargs["past_key_values"][0]
    assert layer["key"].shape == layer["value"].shape
    assert layer["key"].shape[1] == 2
    assert loaded.module is not None
    present = loaded.module(**loaded.example_kwargs)["present"]
    assert present[0]["key"].shape[2] == layer["key"].shape[2] + loaded.example_kwargs["input_ids"].shape[1]


def test_several_gguf_files(tmp_path: Path) -> None:
    for name in ("a.gguf", "b.gguf"):
        (tmp_path / name).write_bytes(b"GGUF")
    assert "a.gguf, b.gguf" in (_refused(tmp_path).found or "")


def test_pickled_weights_need_consent(vit: Path) -> None:
    model = transformers.ViTForImageClassification.from_pretrained(vit)
    (vit / "model.safetensors").unlink()
    assert "no weights" in _refused(vit).what
    torch.save(model.state_dict(), vit / "pytorch_model.bin")
    assert "--allow-pickle" in (_refused(vit).help or "")
    assert load(vit, allow_pickle=True).module is not None


def test_remote_code_never_runs(vit: Path) -> None:
    target = vit / "ran"
    (vit / "modeling_own.py").write_text(f"open({str(target)!r}, 'w').close()\n")
    _edit(vit, model_type="own_vit", auto_map={"AutoConfig": "modeling_own.Config", "AutoModel": "modeling_own.Model"})
    error = _refused(vit)
    assert "factory" in (error.help or "") or "cannot load" in error.what
    assert not target.exists()


@pytest.mark.parametrize(
    ("files", "words"),
    [
        ({}, "not a model folder"),
        ({"model.safetensors": "x"}, "not a model folder"),
        ({"manifest.json": "{}"}, "bundle that tokcc wrote"),
        ({"adapter_config.json": "{}"}, "adapter"),
        ({"config.json": "{"}, "not JSON"),
        ({"config.json": "[]"}, "no model_type"),
        ({"config.json": '{"architecture": "vit_tiny"}'}, "no model_type"),
        ({"config.json": '{"model_type": "vit"}'}, "no weights"),
        ({"config.json": '{"model_type": "vit", "quantization_config": {"quant_method": "gptq"}}'}, "quantised"),
        ({"config.json": '{"model_type": "no_such"}', "model.safetensors": ""}, "cannot load"),
    ],
)
def test_bad_folders(tmp_path: Path, files: dict[str, str], words: str) -> None:
    for name, text in files.items():
        (tmp_path / name).write_text(text)
    assert words in _refused(tmp_path).what


def test_damaged_weights(vit: Path) -> None:
    path = vit / "model.safetensors"
    path.write_bytes(path.read_bytes()[:200])
    assert "cannot load" in _refused(vit).what


def test_inputs_of_a_folder_are_checked(vit: Path) -> None:
    with pytest.raises(CaptureError, match=r"fp32\[2,3,20,20\]"):
        load(vit, inputs=["pixel_values=fp32[2,3,20,20]"])
    with pytest.raises(UsageError, match="does not have"):
        load(vit, inputs=["pixels=fp32[2,3,16,16]"])
