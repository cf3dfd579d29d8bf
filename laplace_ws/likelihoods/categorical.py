"""Softmax over classes."""

# pyright: reportUnknownMemberType=false, reportUnknownVariableType=false, reportUnknownArgumentType=false
# torch leaves the types of split, tolist and cholesky_ex open

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float, Int
from torch import Tensor

from laplace_ws.errors import InvalidBatchError
from laplace_ws.likelihoods.base import Likelihood, at_least_float32, random_signs
from laplace_ws.metrics import evaluate_classification
from laplace_ws.values import whole_number

_USUAL_IGNORE_INDEX = -100
"""The label by which torch's cross entropy and tokenisers mark positions without one."""


@dataclass(frozen=True)
class _Ranks:
    """Softmax probabilities from the most probable class down, and the root of diag(p) − ppᵀ that follows from them.

    "Is it the class of rank j, given that it is none above?" is a yes-or-no question, and the covariance of a label is the sum over these
    questions: s_j = scale_j (e_j − p_below / below_j). That is the Cholesky factor with the classes in this order, with C − 1
    columns [Tanabe & Sagae 1992]; the order makes its columns vanish together where the model is certain, and no terms cancel.

    Attributes:
        classes: class of each rank, `[N, T, C]`.
        p: probability of each rank.
        below: summed probability of the ranks below.
        scale: √(p_j below_j / (p_j + below_j)).
    """

    classes: Int[Tensor, "N T C"]
    p: Float[Tensor, "N T C"]
    below: Float[Tensor, "N T C"]
    scale: Float[Tensor, "N T C"]

    @classmethod
    def of(cls, f: Float[Tensor, "N ... C"], mask: Bool[Tensor, "N ... 1"] | None = None) -> _Ranks:
        """Rank the classes of each example and term; probabilities are zero where a term does not count."""
        logits = at_least_float32(f).reshape(len(f), -1, f.shape[-1])
        p, classes = logits.softmax(-1).sort(-1, descending=True)
        if mask is not None:
            p = p.masked_fill(~mask.reshape(*p.shape[:2], 1), 0)
        from_here = p.flip(-1).cumsum(-1).flip(-1)
        below = F.pad(from_here[..., 1:], (0, 1))
        scale = (p * (below / from_here)).sqrt()
        return cls(classes, p, below, scale.nan_to_num())  # 0/0 where the last probabilities are zero

    def column(self, term: int, rank: int) -> Float[Tensor, "N C"]:
        """s_j of a rank j, in the order of classes."""
        ranked = torch.zeros_like(self.p[:, term])
        scale = self.scale[:, term, rank]
        ranked[:, rank] = scale
        share = self.p[:, term, rank + 1 :] / self.below[:, term, rank, None]
        ranked[:, rank + 1 :] = -scale[:, None] * share.nan_to_num()
        return self._by_class(ranked, term)

    def variances(self, term: int) -> Float[Tensor, " C"]:
        """Σ_n p(1 − p) of each class."""
        p = self.p[:, term]
        above = F.pad(p.cumsum(-1)[:, :-1], (1, 0))
        return self._by_class(p * (above + self.below[:, term]), term).sum(0)

    def _by_class(self, ranked: Float[Tensor, "N C"], term: int) -> Float[Tensor, "N C"]:
        return torch.empty_like(ranked).scatter_(-1, self.classes[:, term], ranked)


class Categorical(Likelihood):
    """Softmax over the last dimension of f; labels are class indices of shape f.shape[:-1].

    Args:
        ignore_index: the label of terms without a true label, such as padding: they carry no loss and no curvature, and are not counted as
            targets. Their inputs still enter the input factors A of K-FAC, which are means over all positions of a layer.
    """

    name = "classification"
    target_ndim = 0
    links: tuple[str, ...] = ("probit", "mc", "bridge", "bridge_norm")
    scores: tuple[str, ...] = ("nll", "ece", "brier")

    def __init__(self, ignore_index: int | None = None):
        self.ignore_index: int | None = None if ignore_index is None else whole_number("ignore_index", ignore_index)

    def check(self, f: Tensor, y: Tensor) -> None:
        """See `Likelihood.check`."""
        if f.ndim not in (2, 3) or f.shape[-1] < 2:
            mend = (
                "flatten the positions and put the classes last (f.flatten(2).mT for [N, C, H, W])"
                if f.ndim > 3
                else 'use likelihood="binary" for a single logit'
            )
            raise InvalidBatchError(
                f"the classification likelihood needs outputs [N, C] or [N, T, C] with C of at least 2, but the model gave "
                f"{tuple(f.shape)}; {mend}."
            )
        if y.shape != f.shape[:-1]:
            raise InvalidBatchError(
                f"the classification likelihood needs labels of shape {tuple(f.shape[:-1])} for outputs {tuple(f.shape)}, "
                f"but they are {tuple(y.shape)}{' (one-hot? use y.argmax(-1))' if y.shape == f.shape else ''}."
            )
        if y.is_floating_point() or y.is_complex() or y.dtype == torch.bool:
            raise InvalidBatchError(f"class labels must be integers, but they are {y.dtype}; use y.long().")
        self._check_range(y if self.ignore_index is None else y[y != self.ignore_index], f.shape[-1])

    def _check_range(self, labels: Tensor, n_classes: int) -> None:
        outside = labels[(labels < 0) | (labels >= n_classes)]
        if not len(outside):
            return
        mend = "renumber the labels or give the model more outputs"
        if self.ignore_index is None and (outside == _USUAL_IGNORE_INDEX).all():
            mend = (
                f"if {_USUAL_IGNORE_INDEX} marks what has no label, use Categorical(ignore_index={_USUAL_IGNORE_INDEX})"
            )
        raise InvalidBatchError(
            f"class labels must lie in 0 … {n_classes - 1} for a model with {n_classes} outputs, but they span "
            f"{int(labels.min())} … {int(labels.max())}; {mend}."
        )

    def term_mask(self, f: Tensor, y: Tensor) -> Bool[Tensor, "N ... 1"] | None:
        """See `Likelihood.term_mask`."""
        return None if self.ignore_index is None else (y != self.ignore_index).unsqueeze(-1)

    @property
    def ignores_targets(self) -> bool:
        """See `Likelihood.ignores_targets`."""
        return self.ignore_index is not None

    def nll_sum(self, f: Tensor, y: Tensor) -> Tensor:
        """See `Likelihood.nll_sum`."""
        f, y = f.reshape(-1, f.shape[-1]), y.reshape(-1).long()
        return F.cross_entropy(f, y, reduction="sum", ignore_index=self._ignored)

    def hessian_columns(self, f: Tensor, mask: Tensor | None = None) -> Iterator[Tensor]:
        """C − 1 columns for each of the T terms in turn, see `_Ranks`: Σ_c s_c s_cᵀ = diag(p) − ppᵀ.

        A column is left out where, for every class, its part of Σ_n p_c(1 − p_c) over the batch is below the rounding error of that sum.
        """
        ranks = _Ranks.of(f, mask)
        eps = torch.finfo(ranks.p.dtype).eps
        for term in range(ranks.p.shape[1]):
            variances = ranks.variances(term)
            for rank in ranks.scale[:, term].count_nonzero(0).nonzero().flatten().tolist():
                of_term = ranks.column(term, rank)
                if (of_term.square().sum(0) <= eps * variances).all():
                    continue
                column = torch.zeros_like(ranks.p)
                column[:, term] = of_term
                yield column.reshape(f.shape).to(f.dtype)

    def root_of_diagonal(self, f: Tensor, mask: Tensor | None = None) -> Tensor | None:
        """See `Likelihood.root_of_diagonal`: √(p(1 − p)), with 1 − p as the probability of all other classes."""
        if type(self).hessian_columns is not Categorical.hessian_columns:  # a class of one's own knows better
            return None
        ranks = _Ranks.of(f, mask)
        above = F.pad(ranks.p.cumsum(-1)[..., :-1], (1, 0))
        roots = (ranks.p * (above + ranks.below)).sqrt()
        return torch.empty_like(roots).scatter_(-1, ranks.classes, roots).reshape(f.shape).to(f.dtype)

    def projected_column(self, f: Tensor, generator: torch.Generator | None) -> Tensor:
        """See `Likelihood.projected_column`; all columns and terms at once, at the cost of a cumulative sum."""
        ranks = _Ranks.of(f)
        signed = ranks.scale * random_signs(ranks.scale.shape, ranks.scale, generator)
        shares = (signed / ranks.below).nan_to_num()[..., :-1].cumsum(-1)
        ranked = signed - ranks.p * F.pad(shares, (1, 0))
        return torch.empty_like(ranked).scatter_(-1, ranks.classes, ranked).reshape(f.shape).to(f.dtype)

    def sampled_column(self, f: Tensor, generator: torch.Generator | None) -> Tensor:
        """See `Likelihood.sampled_column`."""
        p = f.softmax(-1)
        y = torch.multinomial(p.reshape(-1, p.shape[-1]), 1, generator=generator).reshape(p.shape[:-1])
        return self._gradient(p, y)

    def gradient_column(self, f: Tensor, y: Tensor) -> Tensor:
        """See `Likelihood.gradient_column`."""
        counts = self.term_mask(f, y)
        if counts is None:
            return self._gradient(f.softmax(-1), y)
        return self._gradient(f.softmax(-1), y.masked_fill(~counts.squeeze(-1), 0)) * counts

    def predictive_mean(self, f: Tensor) -> Tensor:
        """Class probabilities."""
        return f.softmax(-1)

    def predictive_nll(self, prediction: Tensor, y: Tensor) -> Tensor:
        """See `Likelihood.predictive_nll`."""
        log_p = prediction.clamp_min(torch.finfo(prediction.dtype).tiny).log().flatten(0, -2)
        return F.nll_loss(log_p, y.flatten().long(), ignore_index=self._ignored)

    def score(self, name: str, prediction: Tensor, y: Tensor) -> float:
        """See `Likelihood.score`."""
        if name == "nll":
            return super().score(name, prediction, y)
        counts = y != self._ignored
        return evaluate_classification(prediction[counts], y[counts], kind="probs")[name]

    @property
    def _ignored(self) -> int:
        return _USUAL_IGNORE_INDEX if self.ignore_index is None else self.ignore_index

    def options(self) -> dict[str, Any]:
        """See `Likelihood.options`."""
        return {} if self.ignore_index is None else {"ignore_index": self.ignore_index}

    @staticmethod
    def _gradient(p: Tensor, y: Tensor) -> Tensor:
        return p - F.one_hot(y.long(), p.shape[-1]).to(p.dtype)
