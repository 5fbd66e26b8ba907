"""The machinery of the benchmarks on tiny models: numbers must be right before they are slow to get."""

from functools import partial
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn

import tokcc
from benchmarks import accuracy, decoders, grid, op_profile, probe, speed, timing, tome_eager, vits
from benchmarks.engines import Model, export_plain, open_session
from tokcc.config import load_policy
from tokcc.passes.methods import library


@pytest.fixture(scope="module")
def tiny() -> Model:
    return vits.model("vit-s", 2, layers=2, image_size=64)  # 17 tokens


@pytest.fixture(scope="module")
def engine(tiny: Model, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return export_plain(tiny, tmp_path_factory.mktemp("engine") / "plain.onnx")


def test_plain_export_agrees(tiny: Model, engine: Path) -> None:
    session = open_session(engine, threads=1)
    assert [item.name for item in session.get_inputs()] == ["pixel_values"]
    assert [item.name for item in session.get_outputs()] == ["logits"]
    with torch.no_grad():
        expected = tiny.module(*tiny.args).numpy()
    np.testing.assert_allclose(session.run(None, tiny.feeds())[0], expected, atol=1e-4)


def test_flops_match_the_formula(tiny: Model, engine: Path) -> None:
    B, N, C, layers = 2, 17, 384, 2
    blocks = layers * (4 * N * C**2 + 2 * N**2 * C + 8 * N * C**2)
    patches, head = (N - 1) * C * 3 * 16 * 16, C * vits.CLASSES
    assert op_profile.matrix_flops(engine, tiny.feeds()) == 2 * B * (blocks + patches + head)


def test_profile_groups_inserted_nodes(tiny: Model, engine: Path) -> None:
    runs = op_profile.record(engine, tiny.feeds(), threads=1, runs=2)
    assert len(runs) == 2
    assert len(runs[0]) == len(runs[1]) > 20
    assert op_profile.inserted_share(runs) == 0
    events = [op_profile.Event("tokcc_topk_3", "TopK", 30, (), ()), op_profile.Event("node_x", "MatMul", 70, (), ())]
    assert op_profile.inserted_share([events]) == pytest.approx(0.3)
    # Every node takes 20 us by being profiled at all.
    cheap = [op_profile.Event(f"view_{i}", "Reshape", 20, (), ()) for i in range(30)]
    assert op_profile.inserted_share([cheap + events], net=True) == pytest.approx(10 / 60)
    assert op_profile.by_operator([events, events])[0] == {"op": "MatMul", "inserted": False, "nodes": 1, "ms": 0.07}


def test_eager_tome_with_r_0_is_the_model(tiny: Model) -> None:
    with torch.no_grad():
        torch.testing.assert_close(tome_eager.patched(tiny, 0).module(*tiny.args), tiny.module(*tiny.args))


def test_eager_tome_merges_the_most_similar_pairs() -> None:
    """Against a plain Python loop over all pairs."""
    torch.manual_seed(0)
    B, N, D, r = 2, 13, 8, 3
    x, metric = torch.randn(B, N, D), torch.randn(B, N, 4)
    sizes = torch.randint(1, 4, (B, N, 1)).float()
    found, found_sizes = tome_eager.merge(x, sizes, metric, r)
    for b in range(B):
        unit = metric[b] / metric[b].norm(dim=-1, keepdim=True)
        # (similarity, source, destination) of the best partner of every even token but CLS
        best = [max((float(unit[a] @ unit[d]), a, d) for d in range(1, N, 2)) for a in range(2, N, 2)]
        chosen = sorted(best, reverse=True)[:r]
        total, weight = x[b] * sizes[b], sizes[b].clone()
        for _, a, d in chosen:
            total[d] += total[a]
            weight[d] += weight[a]
        sources = {a for _, a, _ in chosen}
        order = [a for a in range(0, N, 2) if a not in sources] + list(range(1, N, 2))
        torch.testing.assert_close(found[b], (total / weight)[order])
        torch.testing.assert_close(found_sizes[b], weight[order])


def test_eager_tome_token_counts(tiny: Model) -> None:
    x, sizes, metric = torch.randn(1, 21, 8), torch.ones(1, 21, 1), torch.randn(1, 21, 4)
    merged, weights = tome_eager.merge(x, sizes, metric, 16)
    assert merged.shape[1] == 11  # the cap of the paper's table: 21 - (21 - 1) // 2
    assert float(weights.sum()) == 21


def test_probe_learns_and_is_deterministic() -> None:
    rng = np.random.default_rng(0)
    labels = np.arange(300) % 3
    centres = rng.standard_normal((3, 16)) * 2
    features = (centres[labels] + rng.standard_normal((300, 16))).astype(np.float32)
    first = probe.train(features[:200], labels[:200])
    assert first.accuracy(features[200:], labels[200:]) > 0.95
    np.testing.assert_array_equal(first.weight, probe.train(features[:200], labels[:200]).weight)


def test_cosine() -> None:
    rows = np.array([[1.0, 0.0], [1.0, 1.0]], dtype=np.float32)
    np.testing.assert_allclose(probe.cosine(rows, np.array([[2, 0], [-1, -1]], dtype=np.float32)), [1, -1])


def test_interleaving_gives_every_run_the_same_number_of_rounds() -> None:
    calls: list[str] = []
    seconds = timing.interleave({name: partial(calls.append, name) for name in "abc"}, rounds=4, warmup=1)
    assert {name: len(values) for name, values in seconds.items()} == {"a": 4, "b": 4, "c": 4}
    assert "".join(calls[3:9]) == "abcbca"
    assert timing.speedups({"slow": [2, 4], "fast": [1, 1]}, "slow")["fast"]["median"] == 3


def test_compare_reports_no_loss_for_the_same_features() -> None:
    rng = np.random.default_rng(0)
    labels = np.arange(60) % 2
    features = (labels[:, None] * 3 + rng.standard_normal((60, 8))).astype(np.float32)
    data = accuracy.Data("toy", features[:40], features[40:], labels[:40], labels[40:])
    parts = {"train": features[:40], "test": features[40:]}
    row = accuracy.compare(data, parts, parts)
    assert row["cosine_mean"] == pytest.approx(1)
    assert row["top1_agreement"] == 1
    assert row["probe_drop_in"] == row["probe_retrained"] == row["probe_baseline"] > 0.9
    unlabelled = accuracy.compare(accuracy.Data("toy", [], features[40:]), parts, parts)
    assert "probe_drop_in" not in unlabelled


def test_extract_is_cached_per_engine_and_items(tiny: Model, engine: Path, tmp_path: Path) -> None:
    class Pixels:
        model = tiny
        batch = 2

        def datasets(self, train: int, test: int) -> list[accuracy.Data]:
            return []

        def feeds(self, items: accuracy.Items) -> dict[str, np.ndarray]:
            return {"pixel_values": np.asarray(items, dtype=np.float32)}

    items = np.random.default_rng(0).standard_normal((2, 3, 64, 64)).astype(np.float32)
    first = accuracy.extract(Pixels(), engine, items, 1, tmp_path)
    assert first.shape == (2, vits.CLASSES)
    np.testing.assert_array_equal(accuracy.extract(Pixels(), engine, items, 1, tmp_path), first)
    assert len(list(tmp_path.iterdir())) == 1
    accuracy.extract(Pixels(), engine, items[::-1], 1, tmp_path)
    assert len(list(tmp_path.iterdir())) == 2


@pytest.mark.parametrize("policies", [grid.IMAGE, grid.TEXT], ids=["image", "text"])
def test_grid_policies_are_valid(policies: dict[str, grid.Policy]) -> None:
    assert len(policies) >= 12
    for policy in policies.values():
        load_policy(policy, presets=library())


def test_speed_rows_compare_with_the_plain_export(tiny: Model, tmp_path: Path) -> None:
    failures: dict[str, str] = {}
    built = speed.build(tiny, tmp_path, with_tokcc=False, failures=failures)
    assert not failures
    plain, eager = speed.measure(tiny, built, threads=1, rounds=2)
    assert plain["engine"] == speed.PLAIN
    assert "speedup" not in plain
    assert eager["ideal_speedup"] == pytest.approx(plain["gflops"] / eager["gflops"])
    assert eager["ideal_speedup"] > 1.2  # 17 -> 9 -> 5 tokens
    assert eager["speedup"]["runs"] == 2
    assert all(
        row["nodes"] > 20 and speed.markdown_row(row).count("|") == speed.HEADER.splitlines()[0].count("|")
        for row in (plain, eager)
    )


@pytest.mark.skipif(not hasattr(tokcc, "compile"), reason="this tokcc has no compile() yet")
@pytest.mark.slow
def test_speed_compiles_the_tokcc_engines(tiny: Model, tmp_path: Path) -> None:
    failures: dict[str, str] = {}
    built = speed.build(tiny, tmp_path, with_tokcc=True, failures=failures)
    assert not failures
    rows = {row["engine"]: row for row in speed.measure(tiny, built, threads=1, rounds=2)}
    assert set(speed.POLICIES) < set(rows)
    # Nothing is dropped, so nothing changes; the demand slicing saves a part of the last block.
    assert rows["tokcc none"]["output_difference"] < 1e-3
    assert rows["tokcc none"]["ideal_speedup"] > 1
    assert rows["tokcc tome r=13"]["ideal_speedup"] > rows["tokcc none"]["ideal_speedup"]


def test_only_the_classifier_can_be_patched() -> None:
    other = Model("other", nn.Identity(), (torch.zeros(1),), ("x",), ("y",))
    with pytest.raises(TypeError, match="Identity"):
        tome_eager.patched(other, 1)


def test_methods_of_the_command_line() -> None:
    assert decoders.policy_of("none")["steps"] == []
    step = {"preset": "dhsa", "keep": 0.3, "share": "each", "blocks": {"query": 64, "key": 16}}
    found = decoders.policy_of("dhsa:blocks.query=64,blocks.key=16,keep=0.3", keep=0.5, share="each")
    assert found["steps"] == [step]


def test_an_engine_that_differs_is_not_timed() -> None:
    decoders.refuse_difference("x", np.array([1.0, -2.0]), np.array([1.0, -2.001]))
    for got in ([1.0, -2.1], [np.nan, -2.0]):
        with pytest.raises(SystemExit, match="nothing is timed"):
            decoders.refuse_difference("x", np.array(got), np.array([1.0, -2.0]))
