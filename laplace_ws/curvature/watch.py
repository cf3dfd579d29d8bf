"""What data show while they pass through a fit: examples that repeat, features and labels that never change, labels that are one-hot.

Each costs little against the pass that is made anyway, and ends as soon as it can say nothing more. Of the examples, hashes are kept,
and of no more than `MOST_HASHED`.
"""

from __future__ import annotations

import warnings
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor, nn

from laplace_ws.curvature.inputs import ModelInputs
from laplace_ws.errors import DataWarning
from laplace_ws.hashes import hashes_of
from laplace_ws.likelihoods import Likelihood

MOST_HASHED = 2**12
"""Examples that are compared with each other; those after them are not looked at."""
FEWEST = 10
"""Examples below which nothing is said: so few may well share a label or a feature."""
_SHORT = 64
"""Entries of an example of whole numbers, as tokens and codes are, that may well occur twice."""
_WIDEST_TABLE = 256
"""Features of a table; wider inputs are taken for flattened images, whose margins are constant."""
_SHARE, _LEAST = 0.05, 3
"""Share and number of examples that must repeat before it is said."""
_DISTINCT_IN_BOOTSTRAP = 0.632
_PASSED_ON = (
    "ViewBackward0",
    "UnsafeViewBackward0",
    "SqueezeBackward1",
    "UnsqueezeBackward0",
    "ReshapeAliasBackward0",
    "CloneBackward0",
    "ToCopyBackward0",
    "ClampBackward0",
    "ClampBackward1",
    "ClampMinBackward0",
    "ClampMaxBackward0",
    "LogBackward0",
)
"""Operations of autograd behind which what a model ends in may stand."""
_ENDS = {
    "SoftmaxBackward0": "ends in a softmax",
    "LogSoftmaxBackward0": "ends in a log_softmax",
    "SigmoidBackward0": "ends in a sigmoid",
    "LogSigmoidBackward0": "ends in a logsigmoid",
}
_SUM_TO_ONE = (
    "gives outputs that sum to one, as after a softmax",
    "gives logarithms of numbers that sum to one, as after a log_softmax",
)


@dataclass
class DataWatch:
    """Watches the batches of the first pass over data.

    Attributes:
        likelihood: p(y | f).
        hashes: one number for each of the first examples, batch by batch.
        n_examples: examples seen.
    """

    likelihood: Likelihood
    hashes: list[np.ndarray] = field(default_factory=list)
    n_examples: int = 0
    _n_passes: int = 0
    _n_hashed: int = 0
    _hashes_rows: bool = True
    _first_row: Tensor | None = None
    _is_constant: Tensor | None = None
    _label: Tensor | None = None
    _is_one_hot: bool = True

    def begin(self, _: object = None) -> None:
        """A pass begins; all but the first are left alone."""
        self._n_passes += 1

    def __call__(self, x: ModelInputs, y: Tensor) -> None:
        """Look at a batch."""
        if self._n_passes > 1:
            return
        is_first, self.n_examples = not self.n_examples, self.n_examples + len(x)
        if isinstance(x, Tensor) and x.is_floating_point():
            if is_first:
                self._hashes_rows = _may_be_hashed(x)
                if x.ndim == 2 and x.shape[1] <= _WIDEST_TABLE:
                    self._first_row, self._is_constant = x[0].detach().clone(), torch.ones_like(x[0], dtype=torch.bool)
            if self._hashes_rows:
                hashed = hashes_of(x[: max(0, MOST_HASHED - self._n_hashed)])
                self.hashes.append(hashed)
                self._n_hashed += len(hashed)
                self._hashes_rows = self._n_hashed < MOST_HASHED
            self._look_at_features(x)
        self._look_at_labels(y, is_first)

    def _look_at_features(self, x: Tensor) -> None:
        if self._is_constant is None or self._first_row is None:
            return
        if x.shape[1:] != self._first_row.shape:
            self._is_constant = None
            return
        self._is_constant &= (x == self._first_row).all(0)
        if not self._is_constant.any():
            self._is_constant = None

    def _look_at_labels(self, y: Tensor, is_first: bool) -> None:
        if not self.likelihood.is_regression and (is_first or self._label is not None):
            first = y.flatten()[0] if self._label is None else self._label
            self._label = first if (y == first).all() else None
        self._is_one_hot = self._is_one_hot and _are_one_hot(y)

    def warn(self, *, repeats: bool = True, stacklevel: int = 2) -> None:
        """Say what was seen, each in one `DataWarning`.

        Args:
            repeats: whether examples that repeat are worth a word; not where they are drawn with replacement.
            stacklevel: of the warnings.
        """
        if self.n_examples < FEWEST:
            return
        for message in (self._constant(), self._one_class(), self._one_hot(), self._repeated() if repeats else None):
            if message is not None:
                warnings.warn(message, DataWarning, stacklevel=stacklevel + 1)

    def _constant(self) -> str | None:
        if self._is_constant is None or self._first_row is None:
            return None
        columns = self._is_constant.nonzero().flatten().tolist()
        if len(columns) == 1 and self._first_row[columns[0]] == 1:  # a column of ones stands for an intercept
            return None
        return (
            f"{_listed('feature', columns)} of the inputs {'is' if len(columns) == 1 else 'are'} the same in all "
            f"{self.n_examples} examples and tell nothing apart; look at how the table was made, or leave them out."
        )

    def _one_class(self) -> str | None:
        if self._label is None:
            return None
        return (
            f"all labels of the {self.n_examples} examples are {self._label.item():g}, so the data know one class only; look "
            "at the labels, and at the order in which a subset was taken."
        )

    def _one_hot(self) -> str | None:
        if not self._is_one_hot:
            return None
        return (
            f"each row of targets holds a single 1, as one-hot labels do, but the likelihood is {self.likelihood.name!r}; for classes use "
            'likelihood="classification" with y.argmax(-1).'
        )

    def _repeated(self) -> str | None:
        counts = np.unique(self.all_hashes(), return_counts=True)[1]
        n, n_distinct = self._n_hashed, len(counts)
        # of two copies in all the data, both are among the first n with a chance of n/N
        if n - n_distinct < max(_LEAST, _SHARE * n * n / self.n_examples) or _is_bootstrap(counts):
            return None
        first = "" if n == self.n_examples else "first "
        return (
            f"{n - n_distinct} of the {first}{n} examples repeat others, as if data were joined to themselves, and count "
            "twice in the posterior; take the copies out."
        )

    def all_hashes(self) -> np.ndarray:
        """Hashes of all examples that were looked at."""
        return np.concatenate(self.hashes) if self.hashes else np.empty(0, dtype=np.uint64)

    def examples(self) -> frozenset[int]:
        """The different ones among these."""
        return frozenset(self.all_hashes().tolist())


def warn_of_overlap(seen: frozenset[int], n_data: int, watched: DataWatch, *, stacklevel: int = 2) -> None:
    """Warn if many of the watched examples are among those of a fit.

    Args:
        seen: hashes of examples of the fit.
        n_data: number of examples of the fit.
        watched: the examples, and their hashes.
        stacklevel: of the warning.
    """
    hashes = watched.all_hashes().tolist()
    n, n_shared = len(hashes), sum(example in seen for example in hashes)
    if n_shared >= max(_LEAST, _SHARE * n * len(seen) / max(1, n_data)):
        warnings.warn(
            f"{n_shared} of {n} validation examples are among the data of the fit, which the network predicts better than "
            "others; validate on data that it was not trained on.",
            DataWarning,
            stacklevel=stacklevel + 1,
        )


def warn_of_final_operation(
    model: nn.Module, likelihood: Likelihood, operation: str | None, *, stacklevel: int = 2
) -> None:
    """Warn if a model ends in what a likelihood of labels applies itself, as `final_operation` found it."""
    if likelihood.is_regression or operation is None:
        return
    warnings.warn(
        f"{type(model).__name__} {operation}, but the {likelihood.name} likelihood takes logits and turns them into "
        "probabilities itself; leave it out of the model.",
        DataWarning,
        stacklevel=stacklevel + 1,
    )


def final_operation(f: Float[Tensor, "N ..."]) -> str | None:
    """What makes outputs into probabilities, in words; None where they look like logits.

    It is found by the operation of autograd that the outputs come from, whatever changes only their shape, type or range left out, or
    by the outputs themselves: those of each example sum to one, or their exponentials do. A sigmoid of a model's own making is not seen.
    """
    node = f.grad_fn
    for _ in range(len(_PASSED_ON)):
        if node is None or node.name() not in _PASSED_ON:
            break
        node = node.next_functions[0][0]
    if node is not None and node.name() in _ENDS:
        return _ENDS[node.name()]
    if f.ndim < 2 or f.shape[-1] < 2:
        return None
    wide = f.detach().double()
    tolerance = torch.finfo(f.dtype).eps ** 0.5
    sums_to_one = (wide >= 0).all() & ((wide.sum(-1) - 1).abs() < tolerance).all()
    sums_to_one_as_logarithms = (wide.logsumexp(-1).abs() < tolerance).all()
    found = torch.stack([sums_to_one, sums_to_one_as_logarithms]).tolist()
    return next((words for words, is_so in zip(_SUM_TO_ONE, found, strict=True) if is_so), None)


def draws_with_replacement(loader: Any) -> bool:
    """Whether a loader says that it may draw an example more than once."""
    return bool(getattr(getattr(loader, "sampler", None), "replacement", False))


def _may_be_hashed(x: Tensor) -> bool:
    """Whether equal examples are worth a word: not those of a few numbers, of zeros and ones, or of few whole numbers."""
    size = x[0].numel()
    if x.ndim < 2 or size < 4:
        return False
    return not bool(((x == 0) | (x == 1)).all()) and (size >= _SHORT or not bool((x == x.round()).all()))


def _are_one_hot(y: Tensor) -> bool:
    return y.ndim == 2 and y.shape[1] > 2 and bool(((y == 0) | (y == 1)).all() and (y.sum(1) == 1).all())


def _is_bootstrap(counts: np.ndarray) -> bool:
    """Whether examples repeat as in a sample with replacement: 1 − 1/e of them distinct, and some of them three times."""
    return abs(len(counts) / counts.sum() - _DISTINCT_IN_BOOTSTRAP) < 0.03 and counts.max() > 2


def _listed(what: str, numbers: list[int]) -> str:
    shown = ", ".join(map(str, numbers[:5])) + (", …" if len(numbers) > 5 else "")
    return f"{what} {shown}" if len(numbers) == 1 else f"{what}s {shown}"
