"""Methods that choose or merge tokens between LLaVA's tower and its projector, from transformers' own attention."""

from __future__ import annotations

import functools
from dataclasses import dataclass
from typing import Any

import pytest
import torch
import torch.nn.functional as F
import transformers
from torch import Tensor, nn

from tests.passes.oracle import run_engine
from tests.vlm.bundles import given_for
from tests.vlm.families import FAMILIES, model_of
from tokcc.capture.vlm.families.llava import SelectedFeatures
from tokcc.testing import reduce_program, trace


@dataclass
class Seen:
    """One image in the layer whose output is taken: hidden states, attention, queries and keys, class token first.

    Attributes:
        x: ``[17, C]``.
        attention: ``[H, 17, 17]``.
        query: ``[17, C]``.
        key: ``[17, C]``.
        heads: H.
    """

    x: Tensor
    attention: Tensor
    query: Tensor
    key: Tensor
    heads: int

    @property
    def mean_key(self) -> Tensor:
        """Keys of the patches, the mean over heads."""
        return self.key.reshape(len(self.key), self.heads, -1).mean(1)[1:]


@functools.cache
def model() -> Any:
    made = transformers.LlavaForConditionalGeneration._from_config(
        FAMILIES["llava"].config(), attn_implementation="eager"
    )
    made.load_state_dict(model_of("llava").state_dict())
    return made.eval()


@torch.no_grad()
def seen_of(pixels: Tensor) -> Seen:
    tower, which = model().model.vision_tower, model().config.vision_feature_layer
    caught: dict[str, list[Tensor]] = {"q_proj": [], "k_proj": []}

    def catch(module: nn.Module, to: list[Tensor]) -> Any:
        return module.register_forward_hook(lambda _module, _inputs, out: to.append(out[0]))

    named = ((name.rsplit(".", 1)[-1], module) for name, module in tower.named_modules())
    hooks = [catch(module, caught[name]) for name, module in named if name in caught]
    out = tower(pixels, output_hidden_states=True, output_attentions=True)
    for hook in hooks:
        hook.remove()
    attention = out.attentions[which][0]
    return Seen(
        out.hidden_states[which][0], attention, caught["q_proj"][which], caught["k_proj"][which], len(attention)
    )


def best(scores: Tensor, count: int) -> list[int]:
    return sorted(range(len(scores)), key=lambda i: (-float(scores[i]), i))[:count]


def vispruner(seen: Seen) -> Tensor:
    order, x = best(seen.attention[:, 0, 1:].mean(0), 16), F.normalize(seen.x[1:], dim=1)
    members = order[3:]
    while len(members) > 3:
        even, odd = members[0::2], members[1::2]
        closest = {i: float((x[odd] @ x[i]).max()) for i in even}
        gone = min(8, len(members) - 3, len(even))
        members = [*sorted(even, key=lambda i: -closest[i])[gone:], *odd]
    return seen.x[1:][sorted([*order[:3], *members])]


def visionzip(seen: Seen) -> Tensor:
    x, key = seen.x[1:], F.normalize(seen.mean_key, dim=1)
    kept = sorted(best(seen.attention[:, 0, 1:].sum(0), 4))
    rest = [i for i in range(16) if i not in kept]
    targets = rest[::4][:3]
    joined: dict[int, list[int]] = {c: [] for c in targets}
    for j in rest:
        if j not in targets:
            joined[targets[int((key[targets] @ key[j]).argmax())]].append(j)
    made = [x[c] + (x[own].mean(0) if own else 0) for c, own in joined.items()]
    return torch.stack([*x[kept], *made])


def prumerge(seen: Seen) -> Tensor:
    x, key = seen.x[1:], F.normalize(seen.key[1:], dim=1)
    w = (seen.key @ seen.query[0] / len(seen.query[0]) ** 0.5).softmax(0)[1:]
    kept = best(w, 5)
    made = []
    for i in kept:
        near = [j for j in best(key @ key[i], 7) if j != i][:6]
        made.append(x[i] + (w[near, None] * x[near]).sum(0))
    gone = [j for j in range(16) if j not in kept]
    return torch.stack([*made, (w[gone, None] * x[gone]).sum(0)])


def divprune(seen: Seen) -> Tensor:
    z = F.normalize(model().model.multi_modal_projector(seen.x[1:]), dim=1)
    distance = 1 - z @ z.T
    chosen = [int(distance.sort(0).values[1].argmax())]
    while len(chosen) < 6:
        nearest = distance[chosen].amin(0)
        nearest[chosen] = -1
        chosen.append(int(nearest.argmax()))
    return seen.x[1:][sorted(chosen)]


METHODS: dict[str, tuple[dict[str, Any], Any]] = {
    "vispruner": ({"tokens": 6}, vispruner),
    "visionzip": ({"tokens": 7, "contextual": 3}, visionzip),
    "prumerge": ({"tokens": 5, "neighbours": 6}, prumerge),
    "divprune": ({"budget": {"tokens": 6}}, divprune),
}


@pytest.mark.parametrize("name", METHODS)
@torch.no_grad()
def test_image_features(name: str) -> None:
    step, method = METHODS[name]
    made = model_of("llava")
    tower, projector = made.get_submodule("model.vision_tower"), made.get_submodule("model.multi_modal_projector")
    module: nn.Module = SelectedFeatures(tower, projector, made.config.vision_feature_layer, drop_class_token=True)
    given = [picture.units for row in given_for("llava") for picture in row]
    feeds = {"pixel_values": torch.cat(given)}
    wanted = {"version": 1, "steps": [{"preset": name, **step}], "outputs": {"*": "reduced"}}
    reduced, _ = reduce_program(trace(module, feeds), wanted)
    features = run_engine(reduced, feeds)[0]
    for row, pixels in enumerate(given):
        expected = projector(method(seen_of(pixels)))
        torch.testing.assert_close(features[row], expected, rtol=0, atol=2e-4 * float(expected.abs().max()))
