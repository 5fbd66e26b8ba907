"""A case, or several, for every operation that can be lowered."""

from tests.lowering.cases.algebra import algebra_cases
from tests.lowering.cases.elementwise import binary_cases, casts_cases, unary_cases
from tests.lowering.cases.indexing import indexing_cases
from tests.lowering.cases.reductions import reductions_cases
from tests.lowering.cases.shapes import shapes_cases
from tests.lowering.cases.sizes import sizes_cases
from tests.lowering.cases.sparse import sparse_cases
from tests.lowering.cases.tokens import tokens_cases

__all__ = ["CASES"]

CASES = [
    *unary_cases(),
    *binary_cases(),
    *casts_cases(),
    *reductions_cases(),
    *shapes_cases(),
    *sizes_cases(),
    *indexing_cases(),
    *algebra_cases(),
    *sparse_cases(),
    *tokens_cases(),
]
