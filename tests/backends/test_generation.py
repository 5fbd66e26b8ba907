"""The own loop: equal to transformers, to stepping by hand, and to every row alone."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime
import pytest
import torch
from onnx import TensorProto, helper

from tests.decoders.bundles import CAPACITY, compiled, model_folder
from tests.decoders.tiny import VOCABULARY, model_of
from tokcc.backends.bundle import Bundle
from tokcc.backends.generation import DecoderEngine, Generator, Sampling
from tokcc.backends.generation.sampling import Sampler
from tokcc.errors import LoweringError, UsageError
from tokcc.passes.cache.piece import CacheScore

NEW = 24


def prompt(length: int, seed: int = 0) -> list[int]:
    generator = torch.Generator().manual_seed(seed)
    return (torch.randperm(VOCABULARY - 3, generator=generator)[:length] + 3).tolist()


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return model_folder(tmp_path_factory.mktemp("model") / "m")


@pytest.fixture(scope="module")
def none(folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Bundle:
    return compiled(folder, tmp_path_factory.mktemp("none") / "out", "none")


@pytest.fixture(scope="module")
def h2o(folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Bundle:
    return compiled(folder, tmp_path_factory.mktemp("h2o") / "out", "h2o")


def by_hand(bundle: Bundle, ids: list[int], count: int) -> list[int]:
    """Greedy decoding of one row with nothing but ONNX Runtime."""
    session = onnxruntime.InferenceSession(str(bundle.engine("onnx")), providers=["CPUExecutionProvider"])
    names = [item.name for item in session.get_outputs()]
    past = {  # states as wide as a head, as optimum begins
        item.name: np.zeros((1, item.shape[1], 0, 16), np.float32)
        for item in session.get_inputs()
        if item.name.startswith("past")
    }
    new, seen, chosen = list(ids), 0, []
    for _ in range(count):
        feeds = {
            "input_ids": np.array([new]),
            "attention_mask": np.ones((1, seen + len(new)), np.int64),
            "position_ids": np.arange(seen, seen + len(new))[None],
            **past,
        }
        results = dict(zip(names, session.run(None, feeds), strict=True))
        past = {name: results[name.replace("past_key_values", "present")] for name in past}
        seen += len(new)
        new = [int(results["logits"][0, -1].argmax())]
        chosen += new
    return chosen


class TestGreedy:
    def test_without_a_policy_it_is_what_transformers_generates(self, none: Bundle) -> None:
        ids = prompt(20)
        with torch.no_grad():
            wanted = model_of("llama", "sdpa").generate(
                torch.tensor([ids]),
                attention_mask=torch.ones(1, len(ids), dtype=torch.int64),
                max_new_tokens=NEW,
                do_sample=False,
                eos_token_id=None,
            )
        assert Generator(none).generate([ids], max_new_tokens=NEW, stop=()) == [wanted[0, len(ids) :].tolist()]

    @pytest.mark.parametrize("length", [CAPACITY // 2, 3 * CAPACITY])
    def test_an_evicting_engine_equals_stepping_by_hand(self, h2o: Bundle, length: int) -> None:
        ids = prompt(length)
        assert Generator(h2o).generate([ids], max_new_tokens=NEW, stop=()) == [by_hand(h2o, ids, NEW)]

    def test_eviction_changes_the_text(self, none: Bundle, h2o: Bundle) -> None:
        """Else the tests above say little."""
        ids = prompt(3 * CAPACITY)
        assert Generator(none).generate([ids], stop=()) != Generator(h2o).generate([ids], stop=())

    def test_a_padded_batch_equals_its_rows_alone(self, h2o: Bundle) -> None:
        generator = Generator(h2o)
        prompts = [prompt(20, 1), prompt(7, 2), prompt(1, 3), prompt(15, 4)]
        together = generator.generate(prompts, max_new_tokens=NEW, stop=())
        assert together == [generator.generate([row], max_new_tokens=NEW, stop=())[0] for row in prompts]

    def test_a_row_that_ends_leaves_the_others_alone(self, h2o: Bundle) -> None:
        generator = Generator(h2o)
        prompts = [prompt(20, 1), prompt(7, 2)]
        first, second = generator.generate(prompts, max_new_tokens=NEW, stop=())
        stop = next(token for token in first if token not in second)
        ended = first[: first.index(stop) + 1]
        steps = generator.stream(prompts, max_new_tokens=NEW, stop=[stop])
        assert [step[0] for step in steps] == [*ended, *[None] * (NEW - len(ended))]
        assert steps.rows == [ended, second]
        assert steps.stopped == [True, False]
        assert generator.generate(prompts[:1], max_new_tokens=NEW, stop=[stop]) == [ended]


class TestSampling:
    SETTINGS = Sampling(temperature=1.5, top_k=40, top_p=0.95, seed=3)

    def test_equal_seeds_give_equal_texts(self, h2o: Bundle) -> None:
        generator, prompts = Generator(h2o), [prompt(9, 1), prompt(9, 1)]
        first = generator.generate(prompts, sampling=self.SETTINGS, stop=())
        assert first == generator.generate(prompts, sampling=self.SETTINGS, stop=())
        assert first[0] != first[1]  # rows draw their own numbers
        other = Sampling(temperature=1.5, top_k=40, top_p=0.95, seed=4)
        assert first != generator.generate(prompts, sampling=other, stop=())

    def test_one_candidate_is_greedy(self, h2o: Bundle) -> None:
        generator, ids = Generator(h2o), [prompt(9)]
        greedy = generator.generate(ids, stop=())
        assert greedy == generator.generate(ids, sampling=Sampling(temperature=1.0, top_k=1), stop=())
        assert greedy == generator.generate(ids, sampling=Sampling(temperature=1.0, top_p=1e-6), stop=())

    def test_draws_follow_the_probabilities(self) -> None:
        logits = np.log(np.array([0.5, 0.3, 0.15, 0.05], np.float32))

        def shares(**settings: Any) -> list[float]:
            draw = Sampler(Sampling(temperature=settings.pop("temperature", 1.0), **settings), 0)
            return (np.bincount([draw(logits) for _ in range(4000)], minlength=4) / 4000).tolist()

        assert shares() == pytest.approx([0.5, 0.3, 0.15, 0.05], abs=0.03)
        assert shares(top_k=2) == pytest.approx([0.625, 0.375, 0, 0], abs=0.03)
        assert shares(top_p=0.7) == pytest.approx([0.625, 0.375, 0, 0], abs=0.03)  # the one that reaches 0.7 counts
        squares = np.array([0.25, 0.09, 0.0225, 0.0025])
        assert shares(temperature=0.5) == pytest.approx((squares / squares.sum()).tolist(), abs=0.03)

    @pytest.mark.parametrize(
        "settings",
        [
            {"temperature": -1.0},
            {"temperature": float("nan")},
            {"top_k": -1},
            {"top_p": 0.0},
            {"top_p": 1.1},
            {"seed": -1},
        ],
    )
    def test_out_of_range(self, settings: dict[str, Any]) -> None:
        with pytest.raises(UsageError):
            Sampling(**{"temperature": 1.0, **settings})

    def test_candidates_without_a_temperature(self) -> None:
        with pytest.raises(UsageError, match="temperature"):
            Sampling(top_k=5)

    def test_logits_that_are_no_numbers(self) -> None:
        with pytest.raises(LoweringError, match="not numbers"):
            Sampler(Sampling(), 0)(np.array([0.0, np.nan], np.float32))


class TestCache:
    def test_it_stays_at_the_capacity(self, none: Bundle, h2o: Bundle) -> None:
        ids, slot = [prompt(20)], 3 * 2 * 2 * 16 * 4  # layers, key and value, heads, width, bytes
        whole, cut = (Generator(b).stream(ids, max_new_tokens=NEW, stop=()) for b in (none, h2o))
        assert len(list(whole)) == len(list(cut)) == NEW
        assert whole.fed == cut.fed == 20 + NEW - 1  # nobody needs the cache of the last token
        assert whole.cache_bytes == whole.whole_cache_bytes == slot * whole.fed
        scores = 3 * 2 * 4
        assert cut.cache_bytes == (slot + scores) * CAPACITY
        assert cut.whole_cache_bytes == whole.cache_bytes
        assert cut.tokens_per_second > 0

    def test_further_text_goes_on_from_a_cache(self, h2o: Bundle) -> None:
        """What `call` is for: a prompt in two parts gives what the engine gives by hand."""
        engine, ids = DecoderEngine(h2o), np.array([prompt(10)])
        mask, positions = np.ones((1, 10), np.int64), np.arange(10)[None]
        _, past = engine.call(ids[:, :6], mask[:, :6], positions[:, :6], engine.empty_past(1))
        logits, past = engine.call(ids[:, 6:], mask, positions[:, 6:], past)
        whole, _ = engine.call(ids, mask, positions, engine.empty_past(1))
        np.testing.assert_allclose(logits, whole, rtol=0, atol=1e-4 * np.abs(whole).max())  # 10 tokens evict nothing
        assert past["past_key_values.0.key"].shape == (1, 2, 10, 16)

    @pytest.mark.parametrize(
        ("change", "words"),
        [
            (lambda value: value[:, :1], "[1, 1, 0, 16]"),
            (lambda value: value[..., :8], "[1, 2, 0, 8]"),
            (lambda value: value.astype(np.float64), "float64"),
            (lambda value: np.repeat(value, 3, 0), "[3, 2, 0, 16]"),
            (lambda value: value[0], "[2, 0, 16]"),
        ],
    )
    def test_a_foreign_cache(self, h2o: Bundle, change: Any, words: str) -> None:
        engine, one = DecoderEngine(h2o), np.ones((1, 1), np.int64)
        past = engine.empty_past(1)
        past["past_key_values.1.value"] = change(past["past_key_values.1.value"])
        with pytest.raises(UsageError, match="cache does not fit") as caught:
            engine.call(one, one, one * 0, past)
        assert "past_key_values.1.value" in str(caught.value)
        assert words in str(caught.value)

    def test_a_state_that_is_left_out(self, h2o: Bundle) -> None:
        engine, one = DecoderEngine(h2o), np.ones((1, 1), np.int64)
        past = {name: value for name, value in engine.empty_past(1).items() if not name.endswith("score")}
        with pytest.raises(UsageError, match="key_score"):
            engine.call(one, one, one * 0, past)


class TestRefusals:
    def test_empty_prompts(self, h2o: Bundle) -> None:
        for prompts in ([], [[]], [[5], []]):
            with pytest.raises(UsageError, match="empty"):
                Generator(h2o).generate(prompts)
        with pytest.raises(UsageError, match="max_new_tokens"):
            Generator(h2o).generate([[5]], max_new_tokens=0)

    @pytest.mark.parametrize("token", [-1, VOCABULARY])
    def test_tokens_out_of_the_vocabulary(self, h2o: Bundle, token: int) -> None:
        with pytest.raises(UsageError, match="vocabulary") as caught:
            Generator(h2o).generate([[5, token, 6]])
        assert caught.value.found == str(token)

    def test_nothing_there(self, tmp_path: Path) -> None:
        with pytest.raises(UsageError, match="no bundle and no engine"):
            Generator(tmp_path / "nowhere")
        with pytest.raises(UsageError, match="not a tokcc bundle"):
            Generator(tmp_path)

    @pytest.mark.parametrize(
        ("inputs", "outputs", "words"),
        [
            ({"pixels": [1, 3]}, {"logits": [1, 3]}, "inputs pixels"),
            ({"input_ids": [1, 3]}, {"logits": [1, 3]}, "past_key_values"),
            ({"input_ids": [1, 3], "past_key_values.0.key": [1, 2, "p", 4]}, {"logits": [1, 3]}, "present.0.key"),
            (
                {"input_ids": [1, 3], "past_key_values.0.key": [1, "h", "p", 4]},
                {"logits": [1, 3], "present.0.key": [1, "h", "p", 4]},
                "[batch, heads, slots, width]",
            ),
            (
                {"input_ids": [1, 3], "past_key_values.0.key": [1, 2, "p", 4], "pixels": [1, 3]},
                {"logits": [1, 3], "present.0.key": [1, 2, "p", 4]},
                "`pixels`",
            ),
        ],
    )
    def test_other_engines(self, tmp_path: Path, inputs: Any, outputs: Any, words: str) -> None:
        path = tmp_path / "model.onnx"
        _identity(inputs, outputs, path)
        with pytest.raises(UsageError, match="not a decoder's engine") as caught:
            Generator(path)
        assert words in str(caught.value)

    def test_no_model(self, tmp_path: Path) -> None:
        (tmp_path / "model.onnx").write_bytes(b"no model")
        with pytest.raises(LoweringError, match="does not load"):
            Generator(tmp_path / "model.onnx")


class TestDocumentation:
    """The examples of docs/decoders.md run as they stand there."""

    @pytest.fixture
    def examples(self, h2o: Bundle, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> list[str]:
        (tmp_path / "out").symlink_to(h2o.path)
        monkeypatch.chdir(tmp_path)
        text = (Path(__file__).parents[2] / "docs" / "decoders.md").read_text(encoding="utf-8")
        return re.findall(r"```python\n(.*?)```", text, re.DOTALL)

    def test_own_loop(self, examples: list[str], capsys: pytest.CaptureFixture[str]) -> None:
        (code,) = (block for block in examples if "import Generator" in block)
        scope: dict[str, Any] = {}
        exec(code, scope)
        assert len(scope["rows"]) == 2
        assert len(capsys.readouterr().out.splitlines()) == len(scope["steps"].rows[0]) + 1

    def test_onnxruntime_alone(self, examples: list[str], h2o: Bundle) -> None:
        (code,) = (block for block in examples if "InferenceSession" in block)
        scope: dict[str, Any] = {}
        exec(code, scope)
        assert scope["seen"] == 3 + 64 - 1
        assert scope["new"] == by_hand(h2o, [1, 15, 27], 64)[-1:]


def test_memory_is_not_planned_for_every_length(h2o: Bundle) -> None:
    """The runtime keeps a plan for each set of shapes: 50 KB for every token that SmolLM2 generates."""
    assert not DecoderEngine(h2o)._session.session.get_session_options().enable_mem_pattern


class TestStates:
    """What the engines carry beside keys and values, in a form that optimum carries too."""

    def test_names_begin_with_key(self) -> None:
        # A sum names those of its terms, see test_critic_kv.py.
        states = [kind.states for kind in _subclasses(CacheScore) if isinstance(kind.states, tuple)]
        assert len(states) > 5
        assert all(name.startswith("key") for names in states for name in names)

    def test_order_and_width(self, folder: Path, tmp_path: Path) -> None:
        bundle = compiled(folder, tmp_path / "out", "keyformer")
        session = onnxruntime.InferenceSession(str(bundle.engine("onnx")), providers=["CPUExecutionProvider"])
        carried = [item for item in session.get_inputs() if item.name.startswith("past_key_values.")]
        outputs = [item.name for item in session.get_outputs()][1:]
        assert [item.name.replace("past_key_values", "present") for item in carried] == outputs
        states = [item for item in carried if not item.name.endswith((".key", ".value"))]
        assert carried[-len(states) :] == states
        assert len(states) == 2 * 3
        assert all(isinstance(item.shape[3], str) for item in states)


def _subclasses(kind: type[CacheScore]) -> list[type[CacheScore]]:
    return [kind, *(found for child in kind.__subclasses__() for found in _subclasses(child))]


def _identity(inputs: dict[str, Any], outputs: dict[str, Any], path: Path) -> None:
    sources = list(inputs)
    nodes = [helper.make_node("Identity", [sources[i % len(sources)]], [name]) for i, name in enumerate(outputs)]
    graph = helper.make_graph(
        nodes,
        "g",
        [helper.make_tensor_value_info(name, TensorProto.FLOAT, shape) for name, shape in inputs.items()],
        [helper.make_tensor_value_info(name, TensorProto.FLOAT, shape) for name, shape in outputs.items()],
    )
    onnx.save(helper.make_model(graph, opset_imports=[helper.make_opsetid("", 18)], ir_version=8), path)
