"""Which of two is preferred: the Bradley-Terry model, by which rewards are learned from comparisons."""

from __future__ import annotations

from torch import Tensor

from laplace_ws.errors import InvalidBatchError
from laplace_ws.likelihoods.categorical import Categorical


class BradleyTerry(Categorical):
    """p(the c-th of two is preferred) = softmax(r)_c, with the model's rewards r of both [Bradley & Terry 1952].

    In training the model turns a pair `[N, 2, …]` into its two rewards `[N, 2]`, and labels say which is preferred, 0 or 1. Predictions
    are of the rewards themselves, their mean and covariance, for pairs or for single inputs alike: a model that gives one reward
    `[N, 1]` for inputs without the axis of the pair is asked for just that. Scores of validation data are of the preferences in pairs.
    """

    name = "reward_modeling"
    predicts_outputs = True

    def __init__(self) -> None:
        super().__init__()

    def check(self, f: Tensor, y: Tensor) -> None:
        """See `Likelihood.check`."""
        if f.ndim != 2 or f.shape[-1] != 2:
            raise InvalidBatchError(
                f"the reward_modeling likelihood needs the rewards of both inputs of a pair, [N, 2], but the model gave {tuple(f.shape)}; "
                "give it pairs [N, 2, …] in training, and put the two rewards side by side."
            )
        super().check(f, y)
