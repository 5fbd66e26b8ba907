"""``tokcc::block_maxima`` against loops over queries and keys."""

from __future__ import annotations

import pytest
import torch

from tokcc.kernels import block_maxima


@pytest.mark.parametrize(("rows", "length"), [(1, 1), (7, 7), (12, 12), (5, 17), (1, 9)])
@pytest.mark.parametrize("heads", [1, 4])
def test_it_equals_loops(rows: int, length: int, heads: int) -> None:
    generator = torch.Generator().manual_seed(0)
    query, key = (torch.randn(2, n, size, 8, generator=generator) for n, size in ((4, rows), (heads, length)))
    of_query, of_key = (torch.randn(2, 4, size, generator=generator) for size in (rows, length))
    valid = torch.arange(length) >= torch.tensor([[0], [min(4, length - 1)]])
    wanted = torch.full((2, 4, -(-rows // 4), -(-length // 3)), -1e30)
    for sample in range(2):
        for head in range(4):
            for i in range(rows):
                for j in range(length - rows + i + 1):
                    if valid[sample, j]:
                        own = float(query[sample, head, i] @ key[sample, head * heads // 4, j])
                        own += float(of_query[sample, head, i] + of_key[sample, head, j])
                        place = (sample, head, i // 4, j // 3)
                        wanted[place] = max(float(wanted[place]), own)
    got = block_maxima(query, key, of_query, of_key, valid, 4, 3)
    torch.testing.assert_close(got, wanted)
    torch.library.opcheck(block_maxima, (query, key, of_query, of_key, valid, 4, 3))
