"""The two tasks: their data, split three ways, their network, loss and score."""

from __future__ import annotations

import sys
from abc import ABC, abstractmethod
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from jaxtyping import Int
from torch import Tensor, nn

from laplace_ws.models import WideResNet
from train_kfac.config import DataConfig
from train_kfac.molecules import load_molecules
from train_kfac.nets import GraphNetwork, VisionTransformer

_EVALUATED_AT_ONCE = 1000


class Task(ABC):
    """A data set with its network.

    Attributes:
        unit: of the score, of which less is better.
        parts: numbers of the examples of each part, "train", "validation" and "test".
    """

    unit: str
    parts: dict[str, Int[Tensor, " N"]]

    @abstractmethod
    def network(self, options: dict[str, Any]) -> nn.Module:
        """A new network."""

    @abstractmethod
    def batch(self, chosen: Int[Tensor, " N"], device: str) -> tuple[Any, Tensor]:
        """Inputs and targets of some examples."""

    @abstractmethod
    def loss(self, f: Tensor, y: Tensor) -> Tensor:
        """The mean loss of a batch."""

    @abstractmethod
    def errors(self, f: Tensor, y: Tensor) -> Tensor:
        """What the score is the mean of, by example."""

    @torch.no_grad()
    def score(self, model: nn.Module, part: str, device: str) -> float:
        """The score on a part of the data, in eval mode."""
        model.eval()
        batches = (self.batch(chosen, device) for chosen in self.parts[part].split(_EVALUATED_AT_ONCE))
        return torch.cat([self.errors(model(x), y) for x, y in batches]).mean().item()


class MeltingPoints(Task):
    """Melting points of molecules: squared error of the standardised target; mean absolute error in K."""

    unit = "mean absolute error [K]"

    def __init__(self, config: DataConfig):
        self._molecules = load_molecules(Path(config.cache) / "molecules.pt")
        self.parts = split(len(self._molecules), config, n_test=config.n_validation)
        target = self._molecules.melting_point[self.parts["train"]]
        self._mean, self._std = target.mean(), target.std()

    def network(self, options: dict[str, Any]) -> nn.Module:
        return GraphNetwork(**options)

    def batch(self, chosen: Tensor, device: str) -> tuple[Any, Tensor]:
        y = (self._molecules.melting_point[chosen] - self._mean) / self._std
        return self._molecules.batch(chosen).to(device), y.to(device)

    def loss(self, f: Tensor, y: Tensor) -> Tensor:
        return F.mse_loss(f, y)

    def errors(self, f: Tensor, y: Tensor) -> Tensor:
        return (f - y).abs() * self._std.to(f.device)


class Images(Task):
    """Images in folders of classes: cross entropy; error in %."""

    unit = "error [%]"

    def __init__(self, config: DataConfig):
        if config.root is None:
            sys.exit("error: images need --data.root, a folder with train/<class>/ and test/<class>/")
        root, cache = Path(config.root), Path(config.cache) / "images.pt"
        if not cache.exists():
            cache.parent.mkdir(parents=True, exist_ok=True)
            torch.save({part: _read_images(root / part) for part in ("train", "test")}, cache)
        kept = torch.load(cache, weights_only=True)
        (x, y), (x_test, y_test) = kept["train"], kept["test"]
        self.parts = split(len(y), config, n_test=0)
        self.parts["test"] = len(y) + torch.arange(len(y_test))
        self._x, self._y = torch.cat([x, x_test]), torch.cat([y, y_test])
        pixels = x[self.parts["train"][:5000]].float()
        self._mean, self._std = (getattr(pixels, name)((0, 2, 3), keepdim=True) for name in ("mean", "std"))

    def network(self, options: dict[str, Any]) -> nn.Module:
        """A vision transformer, or, with `network: wide-resnet`, a wide residual network."""
        options, n_classes = dict(options), int(self._y.max()) + 1
        if options.pop("network", "vit") == "wide-resnet":
            return WideResNet(in_channels=3, n_classes=n_classes, **options)
        return VisionTransformer(size=self._x.shape[-1], n_classes=n_classes, **options)

    def batch(self, chosen: Tensor, device: str) -> tuple[Any, Tensor]:
        x = (self._x[chosen].to(device).float() - self._mean.to(device)) / self._std.to(device)
        return x, self._y[chosen].to(device)

    def loss(self, f: Tensor, y: Tensor) -> Tensor:
        return F.cross_entropy(f, y)

    def errors(self, f: Tensor, y: Tensor) -> Tensor:
        return 100 * (f.argmax(1) != y).float()


def _read_images(folder: Path) -> tuple[Tensor, Tensor]:
    """Images [N, 3, H, W] as bytes, and their classes."""
    from torchvision.datasets import ImageFolder
    from torchvision.transforms.functional import pil_to_tensor

    pairs = [(pil_to_tensor(image), label) for image, label in ImageFolder(str(folder))]
    return torch.stack([image for image, _ in pairs]), torch.tensor([label for _, label in pairs])


def split(n: int, config: DataConfig, n_test: int) -> dict[str, Int[Tensor, " N"]]:
    """Numbers of the examples of each part, of n, drawn at random."""
    order = torch.randperm(n, generator=torch.Generator().manual_seed(config.seed))
    test, validation, train = order.split([n_test, config.n_validation, n - n_test - config.n_validation])
    return {"train": train[: config.n_train], "validation": validation, "test": test}


def make_task(config: DataConfig) -> Task:
    """The task of a configuration."""
    tasks: dict[str, type[Task]] = {"molecules": MeltingPoints, "images": Images}
    if config.task not in tasks:
        sys.exit(f"error: unknown task {config.task!r}: choose one of {', '.join(map(repr, tasks))}")
    return tasks[config.task](config)  # type: ignore[call-arg]
