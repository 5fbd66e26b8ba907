"""`tokcc run`: the text, its end line, JSON, and what it refuses."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import tokenizers
from tokenizers import decoders, models, pre_tokenizers
from typer.testing import CliRunner

from tests.cli.tiny_vit import build, pixels
from tests.decoders.bundles import CAPACITY, compiled, model_folder
from tokcc.backends.bundle import Bundle
from tokcc.backends.generation import Generator
from tokcc.backends.generation.text import TextStream, Tokenizer
from tokcc.cli import app

PROMPT = " ".join(f"w{i}" for i in range(3, 23))
IDS = list(range(3, 23))


@pytest.fixture(scope="module")
def bundle(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("run")
    return compiled(model_folder(folder / "m"), folder / "out", "h2o").path


def run(*arguments: object, code: int = 0, text: str | bytes | None = None) -> Any:
    result = CliRunner().invoke(app, ["run", *map(str, arguments)], input=text, env={"COLUMNS": "200"})
    assert result.exit_code == code, result.output
    assert "Traceback" not in result.output
    return result


def said(ids: list[int]) -> str:
    """The text of tokens that follow a prompt; 0, 1 and 2 are not said."""
    return "".join(f" w{i}" for i in ids if i > 2)


def as_json(*arguments: object, **options: Any) -> Any:
    return json.loads(run(*arguments, "--json", "--quiet", **options).stdout)


class TestText:
    def test_it_continues_the_prompt(self, bundle: Path) -> None:
        (ids,) = Generator(bundle).generate([IDS], max_new_tokens=16)
        result = run(bundle, PROMPT, "--max-new-tokens", 16)
        assert result.stdout == said(ids) + "\n"  # the prompt is not said again
        line = result.stderr.strip().splitlines()[-1]
        assert line.startswith("20 + 16 tokens, prompt in ")
        assert "tokens/s; KV cache holds " in line
        assert "(all 35 tokens: 26.2 KiB)" in line

    def test_from_standard_input(self, bundle: Path) -> None:
        assert run(bundle, "-", text=PROMPT).stdout == run(bundle, PROMPT).stdout

    def test_quiet_is_the_text_alone(self, bundle: Path) -> None:
        result = run(bundle, PROMPT, "--quiet")
        assert result.stderr == ""
        assert result.stdout == run(bundle, PROMPT).stdout

    def test_json(self, bundle: Path) -> None:
        data = as_json(bundle, PROMPT, "-n", 16)
        assert data["text"] == said(data["tokens"])
        assert (data["prompt_tokens"], data["new_tokens"], data["stopped"]) == (20, 16, False)
        assert data["kv_bytes"] == 3 * 2 * (2 * 16 + 1) * 4 * CAPACITY  # layers, heads, key + value + score, bytes
        assert data["kv_bytes_without_eviction"] == 3 * 2 * 2 * 16 * 4 * 35
        assert data["tokens_per_second"] > 0

    def test_one_token_has_no_speed(self, bundle: Path) -> None:
        assert "one call only" in run(bundle, PROMPT, "-n", 1).stderr

    def test_it_stops_where_the_model_does(self, bundle: Path, tmp_path: Path) -> None:
        tokens = as_json(bundle, PROMPT)["tokens"]
        copy = shutil.copytree(bundle, tmp_path / "out")
        (copy / "generation_config.json").write_text(json.dumps({"eos_token_id": [2, tokens[5]]}))
        data = as_json(copy, PROMPT)
        assert data["tokens"] == tokens[: tokens.index(tokens[5]) + 1]
        assert data["stopped"]

    def test_sampling(self, bundle: Path) -> None:
        def tokens(*options: object) -> Any:
            return as_json(bundle, PROMPT, *options)["tokens"]

        greedy, drawn = tokens(), tokens("--temperature", 2, "--seed", 1)
        assert drawn == tokens("--temperature", 2, "--seed", 1) != tokens("--temperature", 2, "--seed", 2)
        assert tokens("--top-k", 1) == tokens("--top-p", 1e-6) == greedy
        assert tokens("--top-k", 50, "--seed", 1) == tokens("--top-k", 50, "--temperature", 1, "--seed", 1)

    def test_an_own_process(self, bundle: Path) -> None:
        """With a pipe that knows ASCII only, and hub access that would fail."""
        done = subprocess.run(
            [sys.executable, "-m", "tokcc", "run", str(bundle), PROMPT, "-n", "4", "-q"],
            capture_output=True,
            text=True,
            check=True,
            env=os.environ | {"PYTHONIOENCODING": "ascii"},
        )
        assert done.stdout == run(bundle, PROMPT, "-n", 4).stdout


class TestRefusals:
    def test_no_bundle(self, tmp_path: Path) -> None:
        assert "not a tokcc bundle" in run(tmp_path, "x", code=2).stderr

    def test_not_a_decoder(self, tmp_path: Path) -> None:
        import tokcc

        tokcc.compile(build(), "none", example_inputs=(pixels(),), output=tmp_path / "out", calibrate=False)
        text = run(tmp_path / "out", "x", code=2).stderr
        assert "is not a decoder's engine" in text
        assert "--task text-generation" in text

    def test_no_onnx_engine(self, bundle: Path, tmp_path: Path) -> None:
        copy = shutil.copytree(bundle, tmp_path / "out")
        manifest = json.loads((copy / "manifest.json").read_text())
        manifest["backends"] = {}
        (copy / "manifest.json").write_text(json.dumps(manifest))
        assert "--backend onnx" in run(copy, "x", code=2).stderr

    def test_no_tokenizer(self, bundle: Path, tmp_path: Path) -> None:
        copy = shutil.copytree(bundle, tmp_path / "out", ignore=shutil.ignore_patterns("tokenizer*"))
        text = run(copy, "x", code=2).stderr
        assert "has no tokenizer" in text
        assert "token ids" in text

    def test_a_damaged_tokenizer(self, bundle: Path, tmp_path: Path) -> None:
        copy = shutil.copytree(bundle, tmp_path / "out")
        (copy / "tokenizer.json").write_text("{")
        assert "cannot be read" in run(copy, "x", code=2).stderr

    def test_a_foreign_tokenizer(self, bundle: Path, tmp_path: Path) -> None:
        copy = shutil.copytree(bundle, tmp_path / "out")
        text = (copy / "tokenizer.json").read_text()
        (copy / "tokenizer.json").write_text(text.replace('"w5":5', '"w5":500').replace('"w5": 5', '"w5": 500'))
        assert "not in the model's vocabulary" in run(copy, "w5", code=2).stderr

    @pytest.mark.parametrize("prompt", ["", "  \n"])
    def test_an_empty_prompt(self, bundle: Path, prompt: str) -> None:
        assert "the prompt is empty" in run(bundle, prompt, code=2).stderr
        assert "the prompt is empty" in run(bundle, "-", text=prompt, code=2).stderr

    @pytest.mark.parametrize(
        "options",
        [("--top-p", 0), ("--top-p", 2), ("-n", 0), ("--temperature", -1), ("--temperature", 0, "--top-k", 4)],
    )
    def test_settings_out_of_range(self, bundle: Path, options: tuple[object, ...]) -> None:
        run(bundle, "w5", *options, code=2)

    def test_errors_as_json(self, bundle: Path, tmp_path: Path) -> None:
        copy = shutil.copytree(bundle, tmp_path / "out", ignore=shutil.ignore_patterns("tokenizer*"))
        assert as_json(copy, "x", code=2)["error"]["exit_code"] == 2


class TestTokenizer:
    @pytest.fixture
    def made(self) -> tokenizers.Tokenizer:
        """A token for every byte."""
        alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
        tokenizer = tokenizers.Tokenizer(models.BPE({c: i for i, c in enumerate(alphabet)}, []))
        tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
        tokenizer.decoder = decoders.ByteLevel()
        return tokenizer

    @pytest.mark.parametrize("text", ["plain text", "naïve café", "日本語 🦆🦆 end", "\n\t x  y ", "🏳️‍🌈"])
    def test_characters_come_whole(self, made: tokenizers.Tokenizer, text: str) -> None:
        ids = made.encode(text).ids
        stream = TextStream(made.decode)
        pieces = [stream.push(token) for token in ids]
        assert "".join(pieces) + stream.finish() == text
        assert not any("\ufffd" in piece for piece in pieces)

    def test_bytes_that_are_no_character(self, made: tokenizers.Tokenizer) -> None:
        ids = made.encode("é" * 20).ids[::2]  # first bytes only
        stream = TextStream(made.decode)
        assert "".join([*map(stream.push, ids), stream.finish()]) == "\ufffd" * 20

    def test_the_space_after_the_prompt(self, bundle: Path) -> None:
        tokenizer = Tokenizer(bundle)
        assert tokenizer.stream().push(5) == "w5"
        assert tokenizer.stream(tokenizer.encode("w3 w4")).push(5) == " w5"
        assert tokenizer.decode([5, 2]) == "w5"  # </s> is not text

    def test_without_transformers(self, bundle: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        wanted = Tokenizer(bundle).encode(PROMPT)
        monkeypatch.setitem(sys.modules, "transformers", None)
        alone = Tokenizer(bundle)
        assert alone.encode(PROMPT) == wanted == IDS
        assert alone.decode([5, 2, 6]) == "w5 w6"

    def test_no_control_characters_reach_the_terminal(self) -> None:
        from tokcc.cli.run import _printable

        assert _printable("a\x1b[2Jb\x07\r\n\tc\x9b") == "a[2Jb\n\tc"


def test_the_bundle_is_whole(bundle: Path) -> None:
    Bundle.open(bundle).verify()
