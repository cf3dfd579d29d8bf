"""What posteriors of layers with very many outputs cost: last layers of many classes, and language models with large vocabularies.

    python experiments/wide_layers.py --config configs/wide_layers.yaml

Last layers are those of a perceptron with 64 hidden units; the language models are small untied transformers on random tokens. Each row is
measured in a process of its own, in CPU seconds: a fit, the log marginal likelihood after it, the first prediction, with which the
eigenvectors come, and a later one; and the most memory that the process held. Prints a table; writes JSON.
"""

from __future__ import annotations

import multiprocessing
import resource
import sys
import time
import warnings
from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from typing import Any

import torch
import torch.nn.functional as F
from study import read_config, write_result
from torch import Tensor, nn

from laplace_ws import Laplace
from laplace_ws.errors import CurvatureWarning


@dataclass(frozen=True)
class Posterior:
    """One posterior to measure.

    Attributes:
        network: "last layer" of a perceptron, or a "language model", of which the covered weights are those of `subset_of_weights`.
        n_classes: C, or the size of the vocabulary.
        subset_of_weights: "all" or "last_layer".
        curvature: see `Laplace`.
        max_factor_dim: see `Laplace`.
        pred_type: see `Laplace`; "nn" averages ten networks.
        n_predicted: inputs, or sequences, of a prediction.
    """

    network: str
    n_classes: int
    subset_of_weights: str = "last_layer"
    curvature: str = "ggn_mc"
    max_factor_dim: int | None = None
    pred_type: str = "glm"
    n_predicted: int = 32


@dataclass(frozen=True)
class WideConfig:
    """Which posteriors, and the data.

    Attributes:
        posteriors: those that are measured.
        n_train: examples of the perceptron's fits.
        n_sequences: of those of language models.
        n_tokens: of each sequence.
        batch_size: of fits of the perceptron; a language model takes a quarter of it.
        threads: of torch.
        seed: of weights and data.
        out: folder of the results.
    """

    posteriors: list[Posterior] = field(default_factory=list)
    n_train: int = 256
    n_sequences: int = 32
    n_tokens: int = 16
    batch_size: int = 64
    threads: int = 1
    seed: int = 0
    out: str = "runs"


class Block(nn.Module):
    """Causal attention and a perceptron, each behind a norm and beside a skip connection."""

    def __init__(self, width: int, n_heads: int):
        super().__init__()
        self.n_heads = n_heads
        self.norm1, self.norm2 = nn.LayerNorm(width), nn.LayerNorm(width)
        self.qkv, self.out = nn.Linear(width, 3 * width), nn.Linear(width, width)
        self.up, self.down = nn.Linear(width, 4 * width), nn.Linear(4 * width, width)

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = (t.unflatten(-1, (self.n_heads, -1)).transpose(1, 2) for t in self.qkv(self.norm1(x)).chunk(3, -1))
        attended = F.scaled_dot_product_attention(q, k, v, is_causal=True)
        x = x + self.out(attended.transpose(1, 2).flatten(2))
        return x + self.down(F.gelu(self.up(self.norm2(x))))


class LanguageModel(nn.Module):
    """A GPT-2 in small, whose output layer is not its embedding."""

    def __init__(self, vocabulary: int, width: int = 64, n_blocks: int = 2, longest: int = 64):
        super().__init__()
        self.tokens, self.positions = nn.Embedding(vocabulary, width), nn.Parameter(0.02 * torch.randn(longest, width))
        self.blocks = nn.Sequential(*(Block(width, 4) for _ in range(n_blocks)))
        self.norm, self.head = nn.LayerNorm(width), nn.Linear(width, vocabulary, bias=False)

    def forward(self, tokens: Tensor) -> Tensor:
        x = self.tokens(tokens) + self.positions[: tokens.shape[1]]
        return self.head(self.norm(self.blocks(x)))


def make(config: WideConfig, item: Posterior) -> tuple[nn.Module, Tensor, Tensor, int]:
    """Network, inputs, targets, and the size of a batch."""
    torch.manual_seed(config.seed)
    if item.network == "language model":
        tokens = torch.randint(item.n_classes, (config.n_sequences, config.n_tokens + 1))
        return LanguageModel(item.n_classes), tokens[:, :-1], tokens[:, 1:], max(1, config.batch_size // 4)
    model = nn.Sequential(nn.Linear(20, 64), nn.Tanh(), nn.Linear(64, item.n_classes))
    return model, torch.randn(config.n_train, 20), torch.randint(item.n_classes, (config.n_train,)), config.batch_size


def cost(config: WideConfig, item: Posterior) -> dict[str, float]:
    """CPU seconds of each step, and the largest resident memory of this process."""
    torch.set_num_threads(config.threads)
    warnings.simplefilter("ignore", CurvatureWarning)  # that wide factors are diagonal
    model, x, y, batch_size = make(config, item)
    la = Laplace(
        model,
        "classification",
        item.subset_of_weights,
        curvature=item.curvature,
        max_factor_dim=item.max_factor_dim,
    )
    data = list(zip(x.split(batch_size), y.split(batch_size), strict=True))
    options = {"pred_type": item.pred_type, **({"n_samples": 10} if item.pred_type == "nn" else {})}
    steps: dict[str, Callable[[], Any]] = {
        "fit": lambda: la.fit(data),
        "evidence": lambda: la.log_marginal_likelihood().item(),
        "first_prediction": lambda: la(x[: item.n_predicted], **options),
        "prediction": lambda: la(x[: item.n_predicted], **options),
    }
    figures: dict[str, float] = {"n_weights": la.n_params}
    for name, step in steps.items():
        start = time.process_time()
        step()
        figures[f"{name}_seconds"] = time.process_time() - start
    unit = 1 if sys.platform == "darwin" else 1024
    return {**figures, "megabytes": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit / 1e6}


def run(config: WideConfig) -> list[dict[str, Any]]:
    """One row for each posterior."""
    rows: list[dict[str, Any]] = []
    with multiprocessing.get_context("spawn").Pool(1, maxtasksperchild=1) as pool:
        for item in config.posteriors:
            rows.append({**asdict(item), **pool.apply(cost, (config, item))})
            print(as_markdown(rows[-1:]).splitlines()[-1], flush=True)
    return rows


def as_markdown(rows: list[dict[str, Any]]) -> str:
    """The table that is printed."""
    lines = [
        "| posterior | classes | weights | curvature | max_factor_dim | fit [s] | evidence [s] | first prediction [s] | later [s] | MB |",
        "|---|---|---|---|---|---|---|---|---|---|",
    ]
    for row in rows:
        seconds = " | ".join(
            f"{row[f'{name}_seconds']:.2f}" for name in ("fit", "evidence", "first_prediction", "prediction")
        )
        what = "last layer" if row["network"] == "last layer" else f"language model, {row['subset_of_weights']}"
        lines.append(
            f"| {what}, {row['pred_type']} | {row['n_classes']:,} | {row['n_weights']:,} | {row['curvature']} | "
            f"{row['max_factor_dim'] or ''} | {seconds} | {row['megabytes']:,.0f} |"
        )
    return "\n".join(lines)


def main() -> None:
    config = read_config(WideConfig, __doc__)
    rows = run(config)
    print(as_markdown(rows))
    write_result(config, "wide_layers", rows)


if __name__ == "__main__":
    main()
