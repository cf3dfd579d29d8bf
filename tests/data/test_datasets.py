from __future__ import annotations

import pytest
import torch

from laplace_ws.data import DATASET_NAMES, DatasetNotFoundError, load_dataset
from laplace_ws.data.sources import DEBIAN_FASHION_MNIST

SUBSET_TRAIN, SUBSET_TEST = 4000, 1000


@pytest.fixture(scope="module")
def subset():
    return load_dataset()


def write_images(folder, images):
    """Write {(split, class): [uint8 image [H, W] or [H, W, 3]]} as PNG files."""
    from PIL import Image

    for (split, name), pictures in images.items():
        target = folder / split / name
        target.mkdir(parents=True)
        for i, picture in enumerate(pictures):
            Image.fromarray(picture.numpy()).save(target / f"{i}.png")


def random_bytes(*shape, seed=0):
    return torch.randint(0, 256, shape, dtype=torch.uint8, generator=torch.Generator().manual_seed(seed))


def test_bundled_subset_is_balanced_and_shaped(subset):
    assert subset.name == "fashion-mnist-subset"
    assert subset.x_train.shape == (SUBSET_TRAIN, 1, 28, 28)
    assert subset.x_test.shape == (SUBSET_TEST, 1, 28, 28)
    assert subset.x_train.dtype == torch.float32
    assert subset.y_train.dtype == torch.int64
    assert subset.y_train.bincount().tolist() == [400] * 10
    assert subset.y_test.bincount().tolist() == [100] * 10
    assert subset.n_classes == 10
    assert subset.image_shape == (1, 28, 28)


def test_normalised_by_the_training_split(subset):
    x = subset.x_train.double()
    torch.testing.assert_close(x.mean().item(), 0.0, atol=1e-5, rtol=0)
    torch.testing.assert_close(x.std(correction=0).item(), 1.0, atol=1e-5, rtol=0)
    pixels = subset.x_test.double() * subset.std[:, None, None] + subset.mean[:, None, None]
    levels = pixels * 255
    torch.testing.assert_close(levels, levels.round(), atol=1e-3, rtol=0)
    assert 0 <= levels.round().min() <= levels.round().max() == 255


def test_normalisation_is_that_of_the_loaded_images():
    part = load_dataset(n_train=50, dtype=torch.float64)
    torch.testing.assert_close(part.x_train.mean().item(), 0.0, atol=1e-12, rtol=0)
    assert part.mean.item() != load_dataset(dtype=torch.float64).mean.item()


def test_subsets_are_balanced_deterministic_and_leave_the_global_rng():
    before = torch.get_rng_state()
    first, again, other = (load_dataset(n_train=103, n_test=20, seed=seed) for seed in (0, 0, 1))
    assert torch.equal(before, torch.get_rng_state())
    counts = first.y_train.bincount(minlength=10)
    assert counts.sum() == 103
    assert counts.max() - counts.min() == 1
    assert first.y_test.bincount().tolist() == [2] * 10
    assert torch.equal(first.x_train, again.x_train)
    assert not torch.equal(first.x_train, other.x_train)


@pytest.mark.parametrize(("option", "n"), [("n_train", SUBSET_TRAIN + 1), ("n_test", 0)])
def test_impossible_subset_is_refused(option, n):
    with pytest.raises(ValueError, match=f"{option}={n} must be from 1 to"):
        load_dataset(**{option: n})


@pytest.mark.skipif(not DEBIAN_FASHION_MNIST.is_dir(), reason="needs Debian's package dataset-fashion-mnist")
def test_subset_comes_from_the_matching_splits(tmp_path):
    import numpy as np

    from laplace_ws.data.sources import fashion_mnist, fashion_mnist_subset

    full, part = fashion_mnist(tmp_path, False), fashion_mnist_subset(tmp_path, False)
    assert len(full.train.y) == 60000
    assert len(full.test.y) == 10000
    from importlib import resources

    asset = resources.files("laplace_ws.data") / "assets" / "fashion_mnist_subset.npz"
    with asset.open("rb") as file, np.load(file, allow_pickle=False) as arrays:
        index = {"train": torch.from_numpy(arrays["train_index"]), "test": torch.from_numpy(arrays["test_index"])}
    for split in ("train", "test"):
        chosen, whole = getattr(part, split), getattr(full, split)
        assert len(index[split].unique()) == len(chosen.y)
        assert torch.equal(whole.x[index[split]], chosen.x)
        assert torch.equal(whole.y[index[split]], chosen.y)


def test_asset_is_small_and_carries_its_notice():
    from importlib import resources

    assets = resources.files("laplace_ws.data") / "assets"
    assert len((assets / "fashion_mnist_subset.npz").read_bytes()) < 5e6
    assert "Copyright (c) 2017 Zalando SE, https://tech.zalando.com" in (
        assets / "LICENSE.fashion-mnist.txt"
    ).read_text(encoding="utf-8")


@pytest.mark.parametrize(
    ("name", "folder", "remedy"),
    [
        ("fashion-mnist", "FashionMNIST/raw", "dataset-fashion-mnist"),
        ("cifar10", "cifar-10-batches-py", "--data.download true"),
        ("cifar100", "cifar-100-python", "--data.download true"),
        ("image-folder", "train", "--data.root"),
    ],
)
def test_missing_data_is_one_sentence_with_a_way_out(name, folder, remedy, tmp_path, monkeypatch):
    monkeypatch.setattr("laplace_ws.data.sources.DEBIAN_FASHION_MNIST", tmp_path / "absent")
    with pytest.raises(DatasetNotFoundError) as error:
        load_dataset(name, root=tmp_path)
    message = str(error.value)
    assert str(tmp_path / folder) in message
    assert remedy in message
    assert message.endswith(".")
    assert ". " not in message
    assert "\n" not in message
    assert not list(tmp_path.iterdir())


def test_failed_download_says_so(tmp_path, monkeypatch):
    from torchvision.datasets import CIFAR10

    def fail(self):
        raise OSError("no route to host")

    monkeypatch.setattr(CIFAR10, "download", fail)
    with pytest.raises(DatasetNotFoundError, match=r"could not be downloaded to .*no route to host"):
        load_dataset("cifar10", root=tmp_path, download=True)


def test_unknown_name_offers_the_nearest():
    with pytest.raises(ValueError, match="unknown data set 'cifar-10'; did you mean 'cifar10'"):
        load_dataset("cifar-10")
    assert "fashion-mnist-subset" in DATASET_NAMES


def test_image_folder_reads_pixels_and_classes(tmp_path):
    train, test = random_bytes(6, 8, 10, 3), random_bytes(2, 8, 10, 3, seed=1)
    write_images(
        tmp_path,
        {
            ("train", "cat"): train[:4],
            ("train", "dog"): train[4:],
            ("test", "cat"): test[:1],
            ("test", "dog"): test[1:],
        },
    )
    data = load_dataset("image-folder", root=tmp_path, dtype=torch.float64)
    assert data.classes == ("cat", "dog")
    assert data.y_train.tolist() == [0, 0, 0, 0, 1, 1]
    assert data.image_shape == (3, 8, 10)
    for x, raw in ((data.x_train, train), (data.x_test, test)):
        pixels = (x * data.std[:, None, None] + data.mean[:, None, None]) * 255
        torch.testing.assert_close(pixels, raw.permute(0, 3, 1, 2).double())


def test_grey_image_folder_has_one_channel(tmp_path):
    images = random_bytes(2, 6, 6)
    write_images(tmp_path, {("train", "a"): images, ("test", "a"): images})
    assert load_dataset("image-folder", root=tmp_path).image_shape == (1, 6, 6)


def test_image_folder_of_unequal_sizes_names_the_file(tmp_path):
    write_images(
        tmp_path, {("train", "a"): [random_bytes(6, 6), random_bytes(6, 7)], ("test", "a"): [random_bytes(6, 6)]}
    )
    with pytest.raises(ValueError, match=r"1\.png' is 6x7 pixels .*is 6x6; give all images one size"):
        load_dataset("image-folder", root=tmp_path)


def test_image_folder_of_unequal_classes_names_them(tmp_path):
    write_images(tmp_path, {("train", "a"): [random_bytes(6, 6)], ("test", "b"): [random_bytes(6, 6)]})
    with pytest.raises(ValueError, match=r"only one has \['a', 'b'\]"):
        load_dataset("image-folder", root=tmp_path)


def test_held_out_images_are_the_rest_of_the_training_split():
    whole = load_dataset()
    part, held = load_dataset(n_train=1000, seed=3), load_dataset(n_train=1000, seed=3, held_out=True)
    assert torch.equal(part.x_train, held.x_train)
    pixels = lambda data, x: (x * data.std[:, None, None] + data.mean[:, None, None]).mul(255).round().flatten(1)  # noqa: E731
    rows = torch.cat([pixels(held, held.x_train), pixels(held, held.x_test)])
    assert sorted(map(tuple, rows.tolist())) == sorted(map(tuple, pixels(whole, whole.x_train).tolist()))
    with pytest.raises(ValueError, match="held_out needs n_train below 4000"):
        load_dataset(held_out=True)
