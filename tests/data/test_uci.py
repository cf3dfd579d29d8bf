from __future__ import annotations

import numpy as np
import pytest
import torch

from laplace_ws.data import DatasetNotFoundError, load_uci


@pytest.fixture
def table():
    rng = np.random.default_rng(3)
    x = rng.normal(5, 3, (50, 3))
    x[:, 1] = 7.0  # a column that says nothing
    return np.column_stack([x, 100 + 20 * x[:, 0] + rng.normal(size=50)])


@pytest.fixture
def path(table, tmp_path):
    np.savetxt(tmp_path / "table.txt", table)
    return tmp_path / "table.txt"


def test_training_part_is_standardised_and_the_test_part_by_it(path):
    split = load_uci(path, dtype=torch.float64)
    assert (split.x_train.shape, split.y_train.shape) == ((45, 3), (45, 1))
    assert (split.x_test.shape, split.y_test.shape) == ((5, 3), (5, 1))
    for part in (split.x_train[:, [0, 2]], split.y_train):
        torch.testing.assert_close(part.mean(0), torch.zeros(part.shape[1]).double(), rtol=0, atol=1e-12)
        torch.testing.assert_close(part.std(0, correction=0), torch.ones(part.shape[1]).double())
    assert (split.x_train[:, 1] == 0).all()
    assert split.y_test.mean().abs() > 1e-3


def test_rows_are_those_of_the_table_in_their_own_units(path, table):
    split = load_uci(path, split=4, dtype=torch.float64)
    targets = torch.cat([split.y_train, split.y_test]) * split.target_std + split.target_mean
    np.testing.assert_allclose(np.sort(targets.flatten().numpy()), np.sort(table[:, -1]))
    # inputs and targets of a row stay together
    x = torch.cat([split.x_train, split.x_test])[:, 0]
    assert torch.corrcoef(torch.stack([x, targets.flatten()]))[0, 1] > 0.99


def test_splits_differ_repeat_and_leave_the_global_state(path):
    before = torch.get_rng_state(), np.random.get_state()[1].copy()  # noqa: NPY002
    first, again, other, reseeded = (load_uci(path, n, seed) for n, seed in ((0, 0), (0, 0), (1, 0), (0, 1)))
    assert torch.equal(before[0], torch.get_rng_state())
    assert np.array_equal(before[1], np.random.get_state()[1])  # noqa: NPY002
    assert torch.equal(first.y_test, again.y_test)
    assert not torch.equal(first.y_test, other.y_test)
    assert not torch.equal(first.y_test, reseeded.y_test)
    assert first.x_train.dtype == torch.float32


def test_what_cannot_be_is_refused(path, table, tmp_path):
    with pytest.raises(DatasetNotFoundError, match=r"no table at '.*absent.txt'; give the path"):
        load_uci(tmp_path / "absent.txt")
    with pytest.raises(ValueError, match="split=-1 must be at least 0"):
        load_uci(path, -1)
    for name, values, message in (
        ("constant", np.ones((10, 2)), "last column, are constant"),
        ("short", table[:2], "has 2 rows and 4 columns"),
        ("narrow", table[:, :1], "has 50 rows and 1 columns"),
        ("missing", np.where(table == table[0, 0], np.nan, table), "not finite"),
    ):
        np.savetxt(tmp_path / f"{name}.txt", values)
        with pytest.raises(ValueError, match=message):
            load_uci(tmp_path / f"{name}.txt")
    (tmp_path / "words.txt").write_text("a b c\n1 2 3\n")
    with pytest.raises(ValueError, match="no table of numbers"):
        load_uci(tmp_path / "words.txt")
