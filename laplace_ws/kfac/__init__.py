"""K-FAC-expand and K-FAC-reduce as pure functions of inputs and output gradients."""

from laplace_ws.kfac.absent_use import AbsentUse
from laplace_ws.kfac.accumulator import (
    Accumulator,
    DenseAccumulator,
    DiagAccumulator,
    example_gradients,
)
from laplace_ws.kfac.approximation import KfacApprox, KfacApproxSpec, approximation_by_parameter
from laplace_ws.kfac.conv_transpose_use import ConvTransposeUse
from laplace_ws.kfac.conv_use import ConvUse
from laplace_ws.kfac.ekfac import EkfacAccumulator, has_small_rows, lookups, outer_products, rotated_gradients
from laplace_ws.kfac.embedding_use import EmbeddingUse
from laplace_ws.kfac.examples import Examples, ExamplesOrRows, RaggedInputs, Rows, row_examples
from laplace_ws.kfac.expression_use import ExpressionUse
from laplace_ws.kfac.factors import FactorPrecision
from laplace_ws.kfac.grouped_use import GroupedLinearUse
from laplace_ws.kfac.kron_accumulator import KronAccumulator
from laplace_ws.kfac.uses import (
    ElementwiseUse,
    LinearUse,
    MatrixUse,
    PackedLinearUse,
    Use,
)

__all__ = [
    "AbsentUse",
    "Accumulator",
    "ConvTransposeUse",
    "ConvUse",
    "DenseAccumulator",
    "DiagAccumulator",
    "EkfacAccumulator",
    "ElementwiseUse",
    "EmbeddingUse",
    "Examples",
    "ExamplesOrRows",
    "ExpressionUse",
    "FactorPrecision",
    "GroupedLinearUse",
    "KfacApprox",
    "KfacApproxSpec",
    "KronAccumulator",
    "LinearUse",
    "MatrixUse",
    "PackedLinearUse",
    "RaggedInputs",
    "Rows",
    "Use",
    "approximation_by_parameter",
    "example_gradients",
    "has_small_rows",
    "lookups",
    "outer_products",
    "rotated_gradients",
    "row_examples",
]
