from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest

from tokcc.errors import UsageError
from tokcc.report.batches import InputSpec
from tokcc.report.data import load_calibration

WORDS = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "the", "cat", "sat", "on", "a", "mat"]


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_tokenizer(tmp_path_factory.mktemp("model"), pad=True)


def make_tokenizer(folder: Path, *, pad: bool) -> Path:
    transformers = pytest.importorskip("transformers")
    tokenizers = pytest.importorskip("tokenizers")
    raw = tokenizers.Tokenizer(
        tokenizers.models.WordLevel({word: index for index, word in enumerate(WORDS)}, unk_token="[UNK]")
    )
    raw.pre_tokenizer = tokenizers.pre_tokenizers.Whitespace()
    if pad:
        raw.post_processor = tokenizers.processors.TemplateProcessing(
            single="[CLS] $A [SEP]", special_tokens=[("[CLS]", 2), ("[SEP]", 3)]
        )
    names = {"pad_token": "[PAD]"} if pad else {"eos_token": "[SEP]"}
    transformers.PreTrainedTokenizerFast(tokenizer_object=raw, unk_token="[UNK]", **names).save_pretrained(folder)
    return folder


def specs(batch: int | str = "batch", length: int | str = "seq", *extra: str) -> list[InputSpec]:
    return [InputSpec(name, "int64", (batch, length)) for name in ("input_ids", "attention_mask", *extra)]


def jsonl(path: Path, *entries: object) -> Path:
    path.write_text("\n".join(json.dumps(entry) for entry in entries) + "\n\n")
    return path


def test_lines_are_padded_to_a_fixed_length(tmp_path: Path, tokenizer: Path) -> None:
    path = jsonl(tmp_path / "d.jsonl", {"text": "the cat sat", "label": 1}, {"text": "on a mat on a mat", "label": 0})
    data = load_calibration(path, specs(1, 7, "token_type_ids", "position_ids"), preprocessor=tokenizer)
    assert [feed["input_ids"].tolist() for feed in data.feeds] == [[[2, 4, 5, 6, 3, 0, 0]], [[2, 7, 8, 9, 7, 8, 3]]]
    assert data.feeds[0]["attention_mask"].tolist() == [[1, 1, 1, 1, 1, 0, 0]]
    assert data.feeds[0]["position_ids"].tolist() == [[0, 1, 2, 3, 4, 4, 4]]
    assert data.feeds[0]["token_type_ids"].tolist() == [[0] * 7]
    assert data.texts[0] == ["[CLS]", "the", "cat", "sat", "[SEP]", "[PAD]", "[PAD]"]
    assert data.labels == [1, 0]


def test_a_free_length_pads_to_the_longest_of_a_batch(tmp_path: Path, tokenizer: Path) -> None:
    path = tmp_path / "d.txt"
    path.write_text("the cat\n\nthe cat sat\nmat\n")
    data = load_calibration(path, specs(), preprocessor=tokenizer, batch_size=2)
    assert [feed["input_ids"].shape for feed in data.feeds] == [(2, 5), (1, 3)]
    assert data.labels is None
    assert len(data.texts) == 3


def test_a_language_model_reads_a_text_in_windows_without_padding(tmp_path: Path, tokenizer: Path) -> None:
    path = tmp_path / "d.txt"
    path.write_text("the cat sat\non a mat\n" * 5)
    past = InputSpec("past_key_values.0.key", "float32", ("batch", 2, "past", 4))
    data = load_calibration(path, [*specs("batch", 8), past], preprocessor=tokenizer, task="text-generation")
    assert [feed["input_ids"].shape for feed in data.feeds] == [(4, 8)]
    assert data.feeds[0]["past_key_values.0.key"].shape == (4, 2, 0, 4)
    assert data.feeds[0]["attention_mask"].all()
    ids = data.feeds[0]["input_ids"].ravel()
    assert ids[:8].tolist() == [2, 4, 5, 6, 7, 8, 9, 4]
    assert (ids == 2).sum() == 1  # special tokens only at the start
    with pytest.raises(UsageError, match="too short"):
        load_calibration(path, specs(1, 99), preprocessor=tokenizer, task="text-generation")


def test_a_tokenizer_without_padding_uses_its_end_token_and_says_so(tmp_path: Path) -> None:
    folder = make_tokenizer(tmp_path / "model", pad=False)
    path = jsonl(tmp_path / "d.jsonl", {"text": "the cat"}, {"text": "the cat sat"})
    data = load_calibration(path, specs(), preprocessor=folder)
    assert data.feeds[0]["input_ids"].tolist() == [[4, 5, 3], [4, 5, 6]]
    assert any("no padding token" in note for note in data.notes)
    alone = load_calibration(path, specs()[:1], preprocessor=folder)
    assert any("no attention_mask" in note for note in alone.notes)


def test_labels_may_be_words(tmp_path: Path, tokenizer: Path) -> None:
    path = jsonl(tmp_path / "d.jsonl", {"text": "cat", "label": "POSITIVE"}, {"text": "mat", "label": "negative"})
    data = load_calibration(path, specs(), preprocessor=tokenizer, label_names=("negative", "positive"))
    assert data.labels == [1, 0]
    with pytest.raises(UsageError, match="unknown label"):
        load_calibration(path, specs(), preprocessor=tokenizer, label_names=("good", "bad"))


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("", "no text"),
        ("{", r"d\.jsonl:1 is not JSON"),
        ("[1]", r"d\.jsonl:1 is not a JSON object"),
        ('{"text": "a"}\n{"sentence": "b"}', r"d\.jsonl:2 has no text"),
        ('{"text": "a", "label": 0}\n{"text": "b"}', "some have not"),
        ('{"text": "a", "label": true}', "unknown label"),
    ],
)
def test_damaged_lines_are_named(tmp_path: Path, tokenizer: Path, content: str, message: str) -> None:
    path = tmp_path / "d.jsonl"
    path.write_text(content)
    with pytest.raises(UsageError, match=message):
        load_calibration(path, specs(), preprocessor=tokenizer)


def test_what_is_missing_is_said(tmp_path: Path, tokenizer: Path) -> None:
    path = jsonl(tmp_path / "d.jsonl", {"text": "cat"})
    with pytest.raises(UsageError, match="needs the model's tokenizer"):
        load_calibration(path, specs())
    (tmp_path / "empty").mkdir()
    with pytest.raises(UsageError, match="cannot load a tokenizer"):
        load_calibration(path, specs(), preprocessor=tmp_path / "empty")
    with pytest.raises(UsageError, match="takes no text"):
        load_calibration(path, [InputSpec("x", "float32", (1, 3))], preprocessor=tokenizer)
    with pytest.raises(UsageError, match="pixel_values cannot be made from text"):
        load_calibration(path, [*specs(), InputSpec("pixel_values", "float32", (1, 3, 8, 8))], preprocessor=tokenizer)
    (tmp_path / "latin.txt").write_bytes("über".encode("latin-1"))
    with pytest.raises(UsageError, match="cannot read"):
        load_calibration(tmp_path / "latin.txt", specs(), preprocessor=tokenizer)


def test_limit(tmp_path: Path, tokenizer: Path) -> None:
    path = jsonl(tmp_path / "d.jsonl", *({"text": "the cat", "label": i} for i in range(9)))
    data = load_calibration(path, specs(), preprocessor=tokenizer, limit=4)
    assert data.labels == [0, 1, 2, 3]
    assert np.shape(data.feeds[0]["input_ids"]) == (4, 4)
