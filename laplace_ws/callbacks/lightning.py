"""A callback of Lightning's `Trainer` that fits a Laplace posterior."""

from __future__ import annotations

import importlib
import sys
from collections.abc import Iterator, Mapping
from contextlib import suppress
from typing import TYPE_CHECKING, Any

from torch import nn

from laplace_ws.callbacks.fit import EVIDENCE, PosteriorFits
from laplace_ws.curvature.batches import Data
from laplace_ws.likelihoods import Likelihood
from laplace_ws.posterior import Laplace

if TYPE_CHECKING:

    class Callback:
        """See Lightning."""

else:
    # Lightning has two names, whose classes are not those of each other: that of the program's own trainer is taken.
    is_older = "pytorch_lightning" in sys.modules and "lightning.pytorch" not in sys.modules
    for name in ("pytorch_lightning", "lightning.pytorch") if is_older else ("lightning.pytorch", "pytorch_lightning"):
        with suppress(ImportError):
            Callback = importlib.import_module(name).Callback
            break
    else:
        raise ImportError("laplace_ws.callbacks.lightning needs Lightning; install it by: pip install lightning.")

__all__ = ["LaplaceCallback"]


class LaplaceCallback(Callback):
    """Fits a Laplace posterior to the training data when a training ends, and on request every few epochs.

    The posterior is `la`, its log marginal likelihood is logged as "log_marginal_likelihood". The module must compute the outputs of the
    network (logits, or means) in its `forward`; where a part of it does, name that part.

    Args:
        likelihood: of the targets, as for `laplace_ws.Laplace`.
        network: name of the submodule that is the network, as in "net"; the whole module if not given.
        prior_structure: which weights share a prior precision, chosen where the log marginal likelihood is highest, together with the noise
            of a regression; None leaves both as they are.
        every_n_epochs: epochs between two fits in training, whose log marginal likelihoods other callbacks can monitor.
        train_loader: the data of the fit, in place of the trainer's own loader, whose data may be augmented at random.
        **options: others of `laplace_ws.Laplace`.

    Attributes:
        history: log marginal likelihood in nats of each fit, by epoch.
    """

    def __init__(
        self,
        likelihood: str | Likelihood,
        *,
        network: str = "",
        prior_structure: str | None = "layerwise",
        every_n_epochs: int | None = None,
        train_loader: Data | None = None,
        **options: Any,
    ) -> None:
        super().__init__()
        self._fits = PosteriorFits(likelihood, prior_structure, every_n_epochs, options)
        self._network = network
        self._train_loader = train_loader
        self.history: dict[int, float] = self._fits.history

    @property
    def la(self) -> Laplace:
        """The last posterior.

        Raises:
            NotFittedError: there is none yet.
        """
        return self._fits.la

    def on_fit_start(self, trainer: Any, pl_module: Any) -> None:
        """Raise for a submodule that does not exist, before the training."""
        self._network_of(pl_module)

    def on_train_epoch_end(self, trainer: Any, pl_module: Any) -> None:
        """Fit where it is due, and log the evidence as a metric of the epoch."""
        epoch = trainer.current_epoch + 1
        if self._fits.is_due(epoch):
            pl_module.log(EVIDENCE, self._fit(trainer, pl_module, epoch))

    def on_train_end(self, trainer: Any, pl_module: Any) -> None:
        """Fit at the last weights, and log the evidence."""
        epoch = trainer.current_epoch  # which Lightning has counted up by now
        if epoch not in self.history:
            evidence = self._fit(trainer, pl_module, epoch)
            for logger in trainer.loggers:
                logger.log_metrics({EVIDENCE: evidence}, step=trainer.global_step)

    def _fit(self, trainer: Any, pl_module: Any, epoch: int) -> float:
        loader = trainer.train_dataloader if self._train_loader is None else self._train_loader
        if isinstance(loader, (list, tuple, Mapping)) and self._train_loader is None:
            raise TypeError(
                f"the trainer's training data are a {type(loader).__name__}, not one loader; pass the callback the data of the fit as "
                "train_loader."
            )
        return self._fits.fit(self._network_of(pl_module), _OnDevice(loader, trainer), epoch)

    def _network_of(self, pl_module: nn.Module) -> nn.Module:
        try:
            return pl_module.get_submodule(self._network)
        except AttributeError:
            names = ", ".join(name for name, _ in pl_module.named_children())
            raise ValueError(
                f"network={self._network!r} is no submodule of {type(pl_module).__name__}; choose one of {names}."
            ) from None


class _OnDevice:
    """The batches of a loader on the device of the training; in all else the loader itself."""

    def __init__(self, loader: Any, trainer: Any) -> None:
        self._loader, self._trainer = loader, trainer

    def __iter__(self) -> Iterator[Any]:
        for batch in self._loader:
            yield self._trainer.strategy.batch_to_device(batch)

    def __len__(self) -> int:
        return len(self._loader)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._loader, name)
