from __future__ import annotations

import io

import pytest
import torch

from laplace_ws.data import TensorLoader, random_crop_flip

N = 10


def numbered(**options):
    x = torch.arange(N, dtype=torch.float64)[:, None]
    return TensorLoader(x, torch.arange(N), **{"batch_size": 4, **options})


def epoch(loader):
    return torch.cat([y for _, y in loader]).tolist()


def test_in_order_with_a_ragged_last_batch():
    loader = numbered()
    assert [len(y) for _, y in loader] == [4, 4, 2]
    assert len(loader) == 3
    assert loader.n_data == len(loader.dataset) == N
    assert epoch(loader) == list(range(N))


def test_drop_last():
    loader = numbered(drop_last=True)
    assert len(loader) == len(list(loader)) == 2
    assert loader.n_data == N
    assert len(numbered(drop_last=True, batch_size=5)) == 2


def test_batches_in_order_are_views():
    loader = numbered()
    x, _ = next(iter(loader))
    assert x.data_ptr() == loader.dataset.tensors[0].data_ptr()


def test_shuffles_anew_every_epoch_and_keeps_pairs():
    loader = numbered(shuffle=True)
    first, second = epoch(loader), epoch(loader)
    assert first != second
    assert sorted(first) == sorted(second) == list(range(N))
    assert all(torch.equal(x[:, 0], y.double()) for x, y in loader)


def test_seed_decides_and_global_rng_is_untouched():
    before = torch.get_rng_state()
    assert epoch(numbered(shuffle=True, seed=1)) == epoch(numbered(shuffle=True, seed=1))
    assert epoch(numbered(shuffle=True, seed=1)) != epoch(numbered(shuffle=True, seed=2))
    assert torch.equal(before, torch.get_rng_state())


def test_resumed_epochs_equal_uninterrupted_ones():
    loader = numbered(shuffle=True)
    epoch(loader)
    buffer = io.BytesIO()
    torch.save(loader.state_dict(), buffer)
    expected = [epoch(loader), epoch(loader)]
    resumed = numbered(shuffle=True, seed=99)
    buffer.seek(0)
    resumed.load_state_dict(torch.load(buffer, weights_only=True))
    assert [epoch(resumed), epoch(resumed)] == expected


def test_an_epoch_left_early_changes_nothing_later():
    left, whole = numbered(shuffle=True), numbered(shuffle=True)
    next(iter(left))
    epoch(whole)
    assert epoch(left) == epoch(whole)


def test_augments_inputs_only_and_differently_every_epoch():
    x = torch.randn(N, 1, 8, 8)
    loader = TensorLoader(x, torch.arange(N), batch_size=3, augment=random_crop_flip)
    first, second = (torch.cat([x for x, _ in loader]) for _ in range(2))
    assert not torch.equal(first, x)
    assert not torch.equal(first, second)
    assert epoch(loader) == list(range(N))
    again = TensorLoader(x, torch.arange(N), batch_size=3, augment=random_crop_flip)
    assert torch.equal(first, torch.cat([x for x, _ in again]))


@pytest.mark.parametrize(
    ("n_x", "n_y", "options", "problem"),
    [
        (3, 2, {"batch_size": 1}, "x has 3 examples and y 2"),
        (0, 0, {"batch_size": 1}, "empty"),
        (3, 3, {"batch_size": 0}, "batch_size=0 must be at least 1"),
        (3, 3, {"batch_size": 4, "drop_last": True}, "leaves no batch"),
    ],
)
def test_unusable_arguments_are_refused(n_x, n_y, options, problem):
    with pytest.raises(ValueError, match=problem):
        TensorLoader(torch.zeros(n_x, 2), torch.zeros(n_y), **options)


def test_tensors_on_two_devices_are_refused():
    with pytest.raises(ValueError, match="move both to one device"):
        TensorLoader(torch.zeros(3, device="meta"), torch.zeros(3), batch_size=1)
