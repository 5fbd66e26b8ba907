"""Shapes of engines: what is given, what follows, what is missing."""

from __future__ import annotations

from typing import Any

import pytest

from tests.tensorrt.models import WIDTH, decoder, encoder, text_shapes
from tokcc.backends.tensorrt.profiles import make_profiles, varying_axes
from tokcc.errors import PlanError

EXAMPLE = {"src": (2, 21, WIDTH)}


def shapes(*three: tuple[int, ...]) -> dict[str, Any]:
    return {"src": three}


class TestEncoders:
    def test_bounds_of_the_program_serve_where_nothing_is_given(self) -> None:
        reduced, _ = encoder("tome")
        (profile,) = make_profiles(reduced.sliced, EXAMPLE, {})
        assert profile.shapes == {"src": ((1, 1, WIDTH), (2, 21, WIDTH), (64, 9000, WIDTH))}

    def test_what_is_given_is_taken(self) -> None:
        reduced, _ = encoder("tome")
        given = shapes((1, 8, WIDTH), (8, 32, WIDTH), (16, 128, WIDTH))
        (profile,) = make_profiles(reduced.sliced, EXAMPLE, given)
        assert profile.shapes["src"] == given["src"]
        assert profile.option("opt") == "src:8x32x16"
        assert profile.at("max") == {"src": (16, 128, WIDTH)}
        assert profile.covers({"src": (3, 100, WIDTH)})
        assert not profile.covers({"src": (3, 129, WIDTH)})
        assert varying_axes(given) == ("src:0=1..16", "src:1=8..128")

    @pytest.mark.parametrize(
        ("given", "said"),
        [
            ({"y": ((1,), (1,), (1,))}, "no input"),
            (shapes((1, 8), (1, 8), (1, 8)), "another number of axes"),
            (shapes((1, 8, 32), (1, 8, 32), (1, 8, 32)), "`src` axis 2 is fixed"),
            (shapes((1, 8, WIDTH), (1, 8, WIDTH), (1, 9001, WIDTH)), "other bounds"),
        ],
    )
    def test_shapes_that_do_not_fit(self, given: dict[str, Any], said: str) -> None:
        reduced, _ = encoder("tome")
        with pytest.raises(PlanError, match=said) as caught:
            make_profiles(reduced.sliced, EXAMPLE, given)
        assert caught.value.help


class TestDecoders:
    def test_an_axis_without_shapes_is_named(self) -> None:
        reduced, _ = decoder("none")
        with pytest.raises(PlanError, match="no shapes for a dynamic axis: `input_ids` axis 0") as caught:
            make_profiles(reduced.sliced, {}, {})
        assert "--max-shapes input_ids:NxN" in (caught.value.help or "")

    def test_one_size_has_one_range_wherever_it_stands(self) -> None:
        reduced, _ = decoder("none")
        given = text_shapes((1, 8, 16), (1, 32, 64)) | {"position_ids": ((1, 1), (2, 8), (4, 17))}
        with pytest.raises(PlanError, match="another input has"):
            make_profiles(reduced.sliced, {}, given)

    def test_a_whole_cache_is_as_long_as_the_text(self) -> None:
        reduced, _ = decoder("none")
        first, single = make_profiles(reduced.sliced, {}, text_shapes((1, 8, 16), (1, 32, 64)))
        assert first.shapes["past_key_values.0.key"] == ((1, 2, 0, 16), (2, 2, 24, 16), (4, 2, 63, 16))
        assert first.shapes["input_ids"] == ((1, 1), (2, 8), (4, 16))
        assert single.name == "single tokens"
        assert single.shapes["input_ids"] == ((1, 1), (2, 1), (4, 1))
        assert single.shapes["past_key_values.0.key"] == first.shapes["past_key_values.0.key"]

    def test_an_evicted_cache_ends_at_its_budget(self) -> None:
        policy = {"version": 1, "steps": [{"preset": "h2o", "budget": {"kv": {"sinks": 2, "recent": 4, "heavy": 4}}}]}
        reduced, _ = decoder(policy)
        profiles = make_profiles(reduced.sliced, {}, text_shapes((1, 8, 16), (1, 32, 64)))
        assert {three[2][2] for name, three in profiles[0].shapes.items() if name.endswith(".key")} == {10}

    def test_methods_that_shorten_prompts_only_grow_from_there(self) -> None:
        reduced, _ = decoder({"version": 1, "steps": [{"preset": "snapkv", "budget": {"tokens": 12}, "window": 4}]})
        profiles = make_profiles(reduced.sliced, {}, text_shapes((1, 8, 16), (1, 32, 64)))
        assert profiles[0].shapes["past_key_values.0.key"][2][2] == 63

    def test_prompts_only_have_one_profile(self) -> None:
        reduced, _ = decoder("none")
        (profile,) = make_profiles(reduced.sliced, {}, text_shapes((8, 16, 32), (8, 32, 64)))
        assert profile.shapes["past_key_values.0.key"][0][2] == 0

    def test_single_tokens_of_long_texts_have_long_caches(self) -> None:
        reduced, _ = decoder("none")
        (profile,) = make_profiles(reduced.sliced, {}, text_shapes((1, 1, 1), (33, 48, 64)))
        assert [three[2] for three in profile.shapes["past_key_values.0.key"]] == [32, 47, 63]

    def test_slots_are_as_many_as_the_policy_says(self) -> None:
        reduced, _ = decoder({"version": 1, "steps": [], "kv": {"layout": "slots", "tokens": 40}})
        profiles = make_profiles(reduced.sliced, {}, text_shapes((1, 8, 16), (1, 32, 40)))
        assert {three[place][2] for name, three in profiles[0].shapes.items() if name.endswith(".key")
                for place in range(3)} == {40}  # fmt: skip
