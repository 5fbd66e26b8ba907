"""VisionDrop in the language model: attention among the image's tokens; evenly spaced ones take others in."""

from __future__ import annotations

from pathlib import Path

import torch
from torch import Tensor

from tests.prompt.engine import compare, visual_policy
from tests.prompt.models import IMAGE, model_of
from tests.prompt.oracle import Cut, Rebuilding, Stream, Trace, next_layer, run_rebuilt
from tests.prompt.rules import attended, best

LAYERS, KEPT, CONTEXTUAL = (0, 2), (9, 4), 2


def rule(kept: int) -> Rebuilding:
    def cut(stream: Stream) -> tuple[list[int], list[tuple[int, Tensor]]]:
        image = [i for i, own in enumerate(stream.image) if own]
        every = list(range(len(stream.tags)))
        score = attended(stream, image, every).mean((0, 1))
        stay = best(score, image, kept)
        rest = [i for i in image if i not in stay]
        key = next_layer(stream)[1]
        heads = model_of("llama").config.num_key_value_heads
        metric = key[:: len(key) // heads].mean(0)
        step = max(1, len(rest) // CONTEXTUAL)
        targets = rest[::step][:CONTEXTUAL]
        joined: dict[int, list[Tensor]] = {target: [] for target in targets}
        for j in rest:
            if j not in joined:
                cosine = [float(torch.cosine_similarity(metric[j], metric[t], dim=0)) for t in targets]
                joined[targets[cosine.index(max(cosine))]].append(stream.hidden[j])
        made = []
        for target, others in joined.items():
            mean = torch.stack(others).mean(0) if others else torch.zeros(stream.hidden.shape[1])
            made.append((target, stream.hidden[target] + mean))
        return [i for i in every if not stream.image[i] or i in stay], made

    return cut


def test_equals_the_formula(tmp_path: Path) -> None:
    def trace(ids: Tensor, prompt: int) -> Trace:
        cuts = [(layer, rule(kept)) for layer, kept in zip(LAYERS, KEPT, strict=True)]
        return run_rebuilt(model_of("llama"), ids, prompt, IMAGE, cuts)

    step = {"preset": "visiondrop-llm", "layers": list(LAYERS), "tokens": list(KEPT), "contextual": CONTEXTUAL}
    cuts = [Cut(layer, lambda seen: seen.alive) for layer in LAYERS]
    compare("llama", visual_policy(step), lambda: cuts, tmp_path, trace=trace)
