"""What the rules of methods share: selections and softmaxes in plain loops."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from tests.prompt.models import IMAGE
from tests.prompt.oracle import Seen, Stream, next_layer

__all__ = ["attended", "behind", "best", "keep"]


def best(scores: Tensor, among: Sequence[int], count: int) -> list[int]:
    """The best of some tokens, ascending; ties to the earlier one."""
    return sorted(sorted(among, key=lambda j: (-float(scores[j]), j))[:count])


def keep(seen: Seen, scores: Tensor, count: int) -> list[int]:
    """All tokens that are not of the image, and the best of those that are."""
    image = seen.visual(IMAGE)
    return sorted({j for j in seen.alive if j not in set(image)} | set(best(scores, image, count)))


def behind(seen: Seen) -> list[int]:
    """The text behind the image."""
    last = max(j for j in range(len(seen.ids)) if int(seen.ids[j]) == IMAGE)
    return [j for j in seen.alive if j > last]


def attended(seen: Seen | Stream, rows: Sequence[int], alive: Sequence[int]) -> Tensor:
    """What some queries of the next layer would attend to, ``[H, R, N]``."""
    query, key = next_layer(seen)
    found = torch.zeros(query.shape[0], len(rows), query.shape[1])
    for place, row in enumerate(rows):
        columns = [j for j in alive if j <= row]
        values = torch.einsum("hd,hnd->hn", query[:, row], key[:, columns]) / query.shape[-1] ** 0.5
        found[:, place, columns] = torch.softmax(values, -1)
    return found
