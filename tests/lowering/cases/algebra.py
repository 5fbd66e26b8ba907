"""Products, convolutions, norms, softmax and attention."""

from __future__ import annotations

from typing import Any

import torch

from tests.lowering.cases.given import ROW, X, Y, fixed, of, weighted
from tests.lowering.harness import Case, Input

aten = torch.ops.aten


def algebra_cases() -> list[Case]:
    q, k = Input(("B", 2, "N", 4)), Input(("B", 2, "M", 4))
    image, line = Input(("B", 4, 9, 9)), Input(("B", 4, 9))
    sdpa = aten.scaled_dot_product_attention.default
    attend = of(sdpa)

    def masked(b: Any, query: Any, key: Any, value: Any, mask: Any) -> Any:
        return b.call(sdpa, query, key, value, mask, scale=0.3)

    def bounded(b: Any, query: Any, key: Any, value: Any, mask: Any) -> Any:
        added = b.where(mask, 0.0, -1e9)
        return b.call(sdpa, query, key, value, added)

    return [
        Case("linear", weighted(aten.linear.default, (5, 4), (5,)), (X,), half=True),
        Case("linear-no-bias", weighted(aten.linear.default, (5, 4)), (X,)),
        Case("linear-matrix", weighted(aten.linear.default, (5, 4), (5,)), (Input(("B", 4)),)),
        Case("linear-matrix-no-bias", weighted(aten.linear.default, (5, 4)), (Input(("B", 4)),)),
        Case("linear-fed", of(aten.linear.default), (X, Input((5, 4)), Input((5,)))),
        Case("matmul", of(aten.matmul.default), (X, Input(("B", 4, "M"))), half=True),
        Case("matmul-vector", of(aten.matmul.default), (X, ROW)),
        Case("mm", of(aten.mm.default), (Input(("N", 4)), Input((4, "M")))),
        Case("bmm", of(aten.bmm.default), (X, Input(("B", 4, 3)))),
        Case("addmm", of(aten.addmm.default), (ROW, Input(("N", 3)), Input((3, 4)))),
        Case("addmm-scaled", of(aten.addmm.default, beta=0.5, alpha=2), (ROW, Input(("N", 3)), Input((3, 4)))),
        Case("addmm-none", of(aten.addmm.default, beta=0), (ROW, Input(("N", 3)), Input((3, 4)))),
        Case("baddbmm", of(aten.baddbmm.default, beta=2, alpha=3), (Input(("B", "N", 2)), X, Input(("B", 4, 2)))),
        Case(
            "layer_norm",
            lambda b, x: b.call(
                aten.layer_norm.default,
                x,
                [4],
                b.constant("w", fixed(4).to(b.dtype(x))),
                b.constant("v", fixed(4, seed=1).to(b.dtype(x))),
                1e-3,
            ),
            (X,),
            half=True,
        ),
        Case("layer_norm-plain", of(aten.layer_norm.default, [4]), (X,)),
        Case("layer_norm-two", of(aten.layer_norm.default, [3, 4]), (Input(("B", 3, 4)),)),
        Case("rms_norm", lambda b, x: b.call(aten.rms_norm.default, x, [4], b.constant("w", fixed(4)), 1e-5), (X,)),
        Case("rms_norm-plain", of(aten.rms_norm.default, [4]), (X,)),
        Case(
            "batch_norm",
            lambda b, x: b.call(
                aten.batch_norm.default,
                x,
                b.constant("w", fixed(4)),
                b.constant("v", fixed(4, seed=1)),
                b.constant("m", fixed(4, seed=2)),
                b.constant("s", fixed(4, seed=3).abs() + 0.5),
                False,
                0.1,
                1e-5,
                False,
            ),
            (image,),
        ),
        Case(
            "batch_norm-plain",
            lambda b, x: b.call(
                aten.batch_norm.default,
                x,
                None,
                None,
                b.constant("m", fixed(4)),
                b.constant("s", fixed(4).abs() + 0.5),
                False,
                0.1,
                1e-3,
                False,
            ),
            (line,),
        ),
        Case(
            "group_norm",
            lambda b, x: b.call(
                aten.group_norm.default, x, 2, b.constant("w", fixed(4)), b.constant("v", fixed(4, seed=1))
            ),
            (image,),
        ),
        Case("group_norm-plain", of(aten.group_norm.default, 4), (line,)),
        Case("softmax", of(aten.softmax.int, -1), (X,), half=True),
        Case("softmax-dtype", of(aten.softmax.int, 1, torch.float32), (X,), half=True),
        Case("_softmax", of(aten._softmax.default, 1, False), (X,)),
        Case("log_softmax", of(aten.log_softmax.int, 1), (X,), half=True),
        Case("_log_softmax", of(aten._log_softmax.default, -1, False), (X,)),
        Case("conv1d", weighted(aten.conv1d.default, (6, 4, 3), (6,), stride=[2], padding=[1]), (line,)),
        Case("conv1d-groups", weighted(aten.conv1d.default, (4, 1, 3), groups=4, dilation=[2]), (line,)),
        Case("conv1d-same", weighted(aten.conv1d.padding, (6, 4, 4), (6,), padding="same"), (line,)),
        Case("conv1d-valid", weighted(aten.conv1d.padding, (6, 4, 3), (6,), padding="valid"), (line,)),
        Case("conv2d", weighted(aten.conv2d.default, (6, 4, 3, 3), (6,), stride=[3, 2], padding=[1, 0]), (image,)),
        Case("conv2d-same", weighted(aten.conv2d.padding, (6, 4, 3, 4), (6,), padding="same"), (image,)),
        Case(
            "conv2d-same-dilated",
            weighted(aten.conv2d.padding, (6, 4, 3, 3), (6,), padding="same", dilation=[2, 2]),
            (image,),
        ),
        Case(
            "conv3d",
            weighted(aten.conv3d.default, (6, 2, 2, 3, 3), (6,), stride=[2, 3, 3]),
            (Input(("B", 2, 4, 6, 6)),),
        ),
        Case(
            "convolution",
            lambda b, x: b.call(
                aten.convolution.default,
                x,
                b.constant("w", fixed(6, 4, 3, 3)),
                None,
                [2, 2],
                [1, 1],
                [1, 1],
                False,
                [0, 0],
                1,
            ),
            (image,),
        ),
        Case("avg_pool1d", of(aten.avg_pool1d.default, [2]), (line,)),
        Case("avg_pool2d", of(aten.avg_pool2d.default, [3, 3], [2, 2], [1, 1]), (image,)),
        Case("avg_pool2d-exclude", of(aten.avg_pool2d.default, [3, 3], [2, 2], [1, 1], False, False), (image,)),
        *(
            Case(
                f"grid_sampler-{mode}{padding}{int(corners)}",
                of(aten.grid_sampler.default, mode, padding, corners),
                (image, Input(("B", "N", 3, 2))),
            )
            for mode, padding, corners in ((0, 0, False), (0, 1, True), (0, 2, False), (1, 0, False), (2, 0, True))
        ),
        Case("max_pool2d", of(aten.max_pool2d.default, [3, 3], [2, 2], [1, 1]), (image,)),
        Case("max_pool2d-dilated", of(aten.max_pool2d.default, [2, 2], [1, 1], [0, 0], [2, 2]), (image,)),
        Case("adaptive_avg_pool1d", of(aten.adaptive_avg_pool1d.default, [1]), (line,)),
        Case("adaptive_avg_pool2d", of(aten.adaptive_avg_pool2d.default, [1, 1]), (image,)),
        Case("sdpa", attend, (q, k, k), half=True),
        Case("sdpa-bool", masked, (q, k, k, Input(("B", 1, 1, "M"), "bool"))),
        Case("sdpa-bool-rows", masked, (q, k, k, Input(("B", 1, "N", "M"), "bool"))),
        Case("sdpa-float", masked, (q, k, k, Input(("N", "M")))),
        Case("sdpa-bounded", bounded, (q, k, k, Input(("B", 1, 1, "M"), "bool"))),
        Case("sdpa-causal", lambda b, x, y, z: b.call(sdpa, x, y, z, None, 0.0, True), (q, k, k)),
        Case("sdpa-no-heads", attend, (X, X, X)),
        Case("sdpa-no-heads-causal", lambda b, x: b.call(sdpa, x, x, x, None, 0.0, True), (X,)),
        Case("sdpa-groups", lambda b, x, y, z: b.call(sdpa, x, y, z, enable_gqa=True), (Input(("B", 4, "N", 4)), k, k)),
        Case("einsum", lambda b, x, y: b.call(aten.einsum.default, "bnc,bmc->bnm", [x, y]), (X, Y), half=True),
        Case(
            "einsum-three",
            lambda b, x, w, y: b.call(aten.einsum.default, "bnc, c, bnd -> bncd", [x, w, y]),
            (X, ROW, Y),
        ),
    ]
