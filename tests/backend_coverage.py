"""What each backend refuses of the table of models, and why: the rest it covers, as the conformance suite holds."""

from __future__ import annotations

from cases import Case, LinearCase

from laplace_ws.curvature import BACKENDS

BACKEND_NAMES = list(BACKENDS)

NO_MODULE = r"belongs to an? {}, which ASDL has no operation for; freeze it .* or choose backend=\"native\""
REFUSED: dict[str, dict[str, str]] = {
    "native": {},
    "asdl": {
        "fixup": NO_MODULE.format("Fixup"),
        "inplace-batchnorm": NO_MODULE.format("InplaceResidual"),
        "inplace-groupnorm": NO_MODULE.format("InplaceResidual"),
        "functional": NO_MODULE.format("Functional"),
        "transformer-first-token": NO_MODULE.format("Transformerlike"),
        "transformer-tokens": NO_MODULE.format("Transformerlike"),
        "folded-time": NO_MODULE.format("FoldedTime"),
        "matmul": NO_MODULE.format("MatmulNet"),
        "positions": NO_MODULE.format("Positions"),
        "positions-as-many-as-examples": NO_MODULE.format("Positions"),
        "adapters-bare": NO_MODULE.format("LowRankAdapters"),
        "transformer-encoder-layer": NO_MODULE.format("MultiheadAttention"),
        "cross-attention": NO_MODULE.format("MultiheadAttention"),
    },
    "backpack": {},
}
"""The error of each backend on the cases that it does not cover, as a regular expression."""


def refusal(backend: str, case: Case | LinearCase) -> str | None:
    """The error that a backend gives on a case, None where it covers it."""
    return REFUSED[backend].get(case.name)
