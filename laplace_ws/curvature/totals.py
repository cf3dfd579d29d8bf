"""The sums over one pass over the data, apart from the curvature."""

from __future__ import annotations

import math
from dataclasses import dataclass, field, replace

from jaxtyping import Float
from torch import Tensor

from laplace_ws.errors import InvalidBatchError
from laplace_ws.likelihoods import Likelihood


@dataclass
class DataTotals:
    """Sums over examples.

    Attributes:
        nll_sum: summed negative log likelihood, in nats.
        n_examples: examples seen.
        n_targets: scalar targets or loss terms seen, without those that the likelihood ignores.
        output_shape: shape of the model's output for one example; of the last batch, where batches differ.
    """

    nll_sum: float = 0.0
    n_examples: int = 0
    n_targets: float = 0
    output_shape: tuple[int, ...] = field(default=())

    def add(self, likelihood: Likelihood, f: Float[Tensor, "N ..."], y: Tensor) -> float:
        """Add one batch; returns its negative log likelihood.

        Raises:
            InvalidBatchError: its value is not finite.
        """
        nll = likelihood.nll_sum(f.double(), y).item()
        if not math.isfinite(nll):
            raise InvalidBatchError(
                f"the negative log likelihood of a batch is {nll}; look for NaN in its inputs or targets."
            )
        self.nll_sum += nll
        self.n_examples += len(f)
        self.n_targets += likelihood.n_targets(f, y)
        self.output_shape = tuple(f.shape[1:])
        return nll

    def check_not_empty(self, likelihood: Likelihood) -> None:
        """Raise `InvalidBatchError` unless there was an example, and a target that counts."""
        if not self.n_examples:
            raise InvalidBatchError(
                "the data hold no example; give an iterable of batches (x, y) that is not empty or used up."
            )
        if not self.n_targets:
            raise InvalidBatchError(
                f"no target of the {self.n_examples} examples counts for {likelihood!r}; give data of which some are labelled."
            )

    def scaled_to(self, n_data: int) -> DataTotals:
        """The totals of N examples like these."""
        factor = n_data / self.n_examples
        return replace(self, nll_sum=self.nll_sum * factor, n_examples=n_data, n_targets=self.n_targets * factor)

    def __add__(self, other: DataTotals) -> DataTotals:
        return replace(
            self,
            nll_sum=self.nll_sum + other.nll_sum,
            n_examples=self.n_examples + other.n_examples,
            n_targets=self.n_targets + other.n_targets,
            output_shape=other.output_shape,
        )
