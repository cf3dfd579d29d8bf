"""A callback of Hugging Face's `Trainer` that fits a Laplace posterior."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from torch import nn

from laplace_ws.callbacks.fit import EVIDENCE, PosteriorFits
from laplace_ws.curvature.batches import Data
from laplace_ws.curvature.processes import unwrapped
from laplace_ws.likelihoods import Likelihood
from laplace_ws.posterior import Laplace

if TYPE_CHECKING:

    class TrainerCallback:
        """See Hugging Face's transformers."""

else:
    try:
        from transformers import TrainerCallback
    except ImportError as error:
        raise ImportError(
            "laplace_ws.callbacks.huggingface needs Hugging Face's transformers; install it by: pip install transformers."
        ) from error

__all__ = ["LaplaceCallback", "TakesBatch"]


class TakesBatch(nn.Module):
    """A model that takes keywords, as Hugging Face's do, as one that takes a batch with these keys."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, batch: Any) -> Any:
        """What the model returns for the entries of a batch."""
        return self.model(**batch)


class LaplaceCallback(TrainerCallback):
    """Fits a Laplace posterior to the training data when a training ends, and on request every few epochs.

    The posterior is `la`; it takes batches such as the trainer's, `la({"input_ids": …, "attention_mask": …})`, and names the model's
    parameters with "model." before them. Its log marginal likelihood stands in `trainer.state.log_history` as "log_marginal_likelihood".

    Args:
        likelihood: of the labels, as for `laplace_ws.Laplace`.
        prior_structure: which weights share a prior precision, chosen where the log marginal likelihood is highest, together with the noise
            of a regression; None leaves both as they are.
        every_n_epochs: epochs between two fits in training.
        train_loader: the data of the fit, in place of the trainer's own loader.
        **options: others of `laplace_ws.Laplace`; for a large network, `subset_of_weights="last_layer"`.

    Attributes:
        history: log marginal likelihood in nats of each fit, by epoch.
    """

    def __init__(
        self,
        likelihood: str | Likelihood,
        *,
        prior_structure: str | None = "layerwise",
        every_n_epochs: int | None = None,
        train_loader: Data | None = None,
        **options: Any,
    ) -> None:
        super().__init__()
        self._fits = PosteriorFits(likelihood, prior_structure, every_n_epochs, options)
        self._train_loader = train_loader
        self.history: dict[int, float] = self._fits.history

    @property
    def la(self) -> Laplace:
        """The last posterior.

        Raises:
            NotFittedError: there is none yet.
        """
        return self._fits.la

    def on_epoch_end(self, args: Any, state: Any, control: Any, **given: Any) -> None:
        """Fit where it is due."""
        if self._fits.is_due(round(state.epoch)):
            self._fit(state, given)

    def on_train_end(self, args: Any, state: Any, control: Any, **given: Any) -> None:
        """Fit at the last weights."""
        if round(state.epoch) not in self.history:
            self._fit(state, given)

    def _fit(self, state: Any, given: dict[str, Any]) -> None:
        loader = given["train_dataloader"] if self._train_loader is None else self._train_loader
        evidence = self._fits.fit(TakesBatch(unwrapped(given["model"])), loader, round(state.epoch))
        state.log_history.append({EVIDENCE: evidence, "epoch": state.epoch, "step": state.global_step})
