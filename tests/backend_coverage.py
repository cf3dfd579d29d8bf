"""What each backend covers of the table of models, and the error that it gives on the rest: held by the conformance suite.

    python tests/backend_coverage.py

writes the table of it into README.md and docs/backends.md; a test fails where they differ.
"""

from __future__ import annotations

from pathlib import Path

from cases import Case, LinearCase

from laplace_ws.curvature import FACTOR_BACKENDS

BACKEND_NAMES = list(FACTOR_BACKENDS)

NO_MODULE = r"belongs to an? {}, which ASDL has no operation for; freeze it .* or choose backend=\"native\""
OPAQUE = r"'{}' is used by {}, which has no curvature block; freeze it .* or choose backend=\"native\""
REFUSED: dict[str, dict[str, str]] = {
    "native": {},
    "asdl": {
        "fixup": NO_MODULE.format("Fixup"),
        "inplace-batchnorm": NO_MODULE.format("InplaceResidual"),
        "inplace-groupnorm": NO_MODULE.format("InplaceResidual"),
        "functional": NO_MODULE.format("Functional"),
        "transformer-first-token": NO_MODULE.format("Transformerlike"),
        "transformer-tokens": NO_MODULE.format("Transformerlike"),
        "matmul": NO_MODULE.format("MatmulNet"),
        "positions": NO_MODULE.format("Positions"),
        "positions-as-many-as-examples": NO_MODULE.format("Positions"),
        "adapters-bare": NO_MODULE.format("LowRankAdapters"),
        "transformer-encoder-layer": NO_MODULE.format("MultiheadAttention"),
        "cross-attention": NO_MODULE.format("MultiheadAttention"),
        "recurrent": NO_MODULE.format("LSTM"),
        "einsum-attention": NO_MODULE.format("EinsumAttention"),
        "experts": NO_MODULE.format("Experts"),
        "time-first": NO_MODULE.format("MultiheadAttention"),
        "expressions": NO_MODULE.format("Expressions"),
    },
    "backpack": {
        "transformer-encoder-layer": OPAQUE.format("1.self_attn.in_proj_weight", "TransformerEncoderLayer"),
        "cross-attention": OPAQUE.format("attention.in_proj_weight", "MultiheadAttention"),
        "recurrent": OPAQUE.format("lstm.weight_ih_l0", "LSTM"),
        "einsum-attention": OPAQUE.format("q", "einsum"),
        "experts": r"Experts cannot be traced for BackPACK .* or choose backend=\"native\"",
        "time-first": OPAQUE.format("layer.self_attn.in_proj_weight", "TransformerEncoderLayer"),
        "expressions": OPAQUE.format("log_scale", "exp"),
    },
}
"""The error of each backend on the cases that it does not cover, as a regular expression."""

ROWS = {
    "perceptrons: classification, regression, binary, one output": [
        *("mlp", "mlp-regression", "mlp-one-output", "mlp-binary", "mlp-flat-binary"),
        *("linear", "linear-two-extra-dims"),
    ],
    "convolutions in 1, 2 and 3 dimensions: stride, padding (also `same`, circular), dilation, groups": [
        *("cnn", "conv3d", "grouped-conv"),
        *("conv1d", "conv1d-stride-padding", "conv1d-same-even-kernel", "conv1d-groups", "conv2d"),
        *("conv2d-stride-dilation", "conv2d-same-dilation", "conv2d-valid", "conv2d-circular", "conv2d-groups"),
        *("conv3d-linear", "conv3d-circular-dilation"),
    ],
    "Wide ResNets: Fixup, batch norm, group norm, none": [
        *("wide-resnet-fixup", "wide-resnet-batch", "wide-resnet-group", "wide-resnet-none")
    ],
    "residual networks as torchvision writes them: in-place ReLU, `+=`": ["residual-blocks"],
    "scales, biases, PReLU, Layer and RMS norm as modules": ["scalars-and-norms"],
    "outputs of each token `[N, T, C]`": ["mlp-tokens", "sequence-conv1d"],
    "a vision transformer block, attention from plain calls": ["vision-transformer"],
    "`nn.MultiheadAttention`, `nn.TransformerEncoderLayer`, cross-attention": [
        *("transformer-encoder-layer", "cross-attention")
    ],
    "embeddings": ["embedding", "embedding-padding"],
    "weights tied between layers of one kind": ["tied-weights", "tied-weights-linear"],
    "a module called twice": ["called-twice", "called-twice-linear"],
    "frozen layers; low-rank adapters that are modules, on a frozen base": ["frozen-layers", "adapters"],
    "parameters used without a layer of their own: scales, biases, `F.linear`, `x @ W`, bare adapters": [
        *(
            "fixup",
            "inplace-batchnorm",
            "inplace-groupnorm",
            "functional",
            "matmul",
            "adapters-bare",
        )
    ],
    "class tokens and position parameters": ["transformer-first-token", "transformer-tokens"],
    "examples and time folded into one axis": ["folded-time"],
    "position embeddings looked up without a batch axis, `pos(torch.arange(T))`; tables of relative positions": [
        *("positions", "positions-as-many-as-examples")
    ],
    "message passing on batches of graphs": ["message-passing"],
    "transposed convolutions, as in U-Nets": ["u-net"],
    "`nn.LSTM`, `nn.GRU`, `nn.RNN` and their cells": ["recurrent"],
    "products of any form: `einsum`, `tensordot`, `bmm`, `addmm`, weights on the left, stacked, split or viewed": [
        "einsum-attention"
    ],
    "mixtures of experts with masked routing": ["experts"],
    "layers that take the time as their first axis": ["time-first"],
    "parameters that enter by what is computed from them: exponentiated, added, masked, multiplied": ["expressions"],
}
"""Lines of the table, and the cases that they stand for."""

BEGIN, END = "<!-- table of backends: python tests/backend_coverage.py -->", "<!-- end of the table of backends -->"
ROOT = Path(__file__).parent.parent
DOCUMENTS = (ROOT / "README.md", ROOT / "docs" / "backends.md")


def refusal(backend: str, case: Case | LinearCase) -> str | None:
    """The error that a backend gives on a case, None where it covers it."""
    return REFUSED.get(backend, {}).get(case.name)


def table() -> str:
    """What each backend covers, in Markdown."""
    lines = [f"| | {' | '.join(BACKEND_NAMES)} |", "|---" * (len(BACKEND_NAMES) + 1) + "|"]
    for label, cases in ROWS.items():
        refused = [sum(name in REFUSED.get(backend, {}) for name in cases) for backend in BACKEND_NAMES]
        cells = [
            "yes" if n == 0 else "refused" if n == len(cases) else f"{len(cases) - n} of {len(cases)}" for n in refused
        ]
        lines.append(f"| {label} | {' | '.join(cells)} |")
    return "\n".join(lines)


def with_table(text: str) -> str:
    """A document with its table renewed."""
    before, rest = text.split(BEGIN)
    return f"{before}{BEGIN}\n\n{table()}\n\n{END}{rest.split(END)[1]}"


if __name__ == "__main__":
    for path in DOCUMENTS:
        path.write_text(with_table(path.read_text()))
