"""UCI regression tables: a text file in, a standardised random split out."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor

from laplace_ws.data.sources import DatasetNotFoundError
from laplace_ws.values import path_of, shown, whole_number

TEST_SHARE = 0.1


@dataclass(frozen=True, eq=False)
class UciSplit:
    """One random split of a table; inputs and targets are standardised by the training part.

    `y * target_std + target_mean` converts targets back to their own units. A density of standardised targets is `target_std` times that in
    the target's own units: subtract `log(target_std)` from a log-likelihood per example to report it there.

    Attributes:
        x_train: inputs, mean 0 and deviation 1 in every column that is not constant.
        y_train: targets, mean 0 and deviation 1.
        x_test: inputs by the training part's mean and deviation.
        y_test: targets likewise.
        target_mean: of the training targets, in their own units.
        target_std: of the training targets, in their own units.
    """

    x_train: Float[Tensor, "N I"]
    y_train: Float[Tensor, "N 1"]
    x_test: Float[Tensor, "M I"]
    y_test: Float[Tensor, "M 1"]
    target_mean: float
    target_std: float


def load_uci(path: str | Path, split: int = 0, seed: int = 0, *, dtype: torch.dtype = torch.float32) -> UciSplit:
    """Read a table of numbers whose last column is the target, and set aside a tenth of its rows for testing.

    Args:
        path: text file of numbers separated by blanks, one example per line.
        split: number of the split, from 0; each is a random choice of its own.
        seed: of all splits. The global random state is neither used nor changed.
        dtype: of the tensors; means and deviations are taken in float64.

    Raises:
        DatasetNotFoundError: there is no such file.
        ValueError: the file is not a table of finite numbers or is too small, its target is constant, or the split is negative.
    """
    table = _read_table(path_of("path", path))
    if not isinstance(dtype, torch.dtype) or not dtype.is_floating_point:  # pyright: ignore[reportUnnecessaryIsInstance]
        raise TypeError(f"dtype must be a floating point type, such as torch.float32, got {shown(dtype)}.")
    seed = whole_number("seed", seed, least=0)
    if whole_number("split", split) < 0:
        raise ValueError(f"split={split} must be at least 0")
    order = np.random.default_rng([seed, split]).permutation(len(table))
    n_test = max(1, round(TEST_SHARE * len(table)))
    test, train = table[order[:n_test]], table[order[n_test:]]
    mean, std = train.mean(0), train.std(0)
    if std[-1] == 0:
        raise ValueError(
            f"the targets of '{path}', its last column, are constant; give a table with a target to predict"
        )
    # a constant input becomes zero, whatever it is divided by
    scale = np.where(std == 0, 1.0, std)
    train, test = (torch.from_numpy((part - mean) / scale).to(dtype) for part in (train, test))
    return UciSplit(train[:, :-1], train[:, -1:], test[:, :-1], test[:, -1:], float(mean[-1]), float(std[-1]))


def _read_table(path: Path) -> np.ndarray:
    try:
        table = np.loadtxt(path, ndmin=2)
    except (FileNotFoundError, IsADirectoryError) as error:
        raise DatasetNotFoundError(
            f"There is no table at '{path}'; give the path of a text file of numbers, its last column the target."
        ) from error
    except ValueError as error:
        raise ValueError(f"'{path}' is no table of numbers with blanks between them: {error}") from error
    n_rows, n_columns = table.shape
    if n_rows < 3 or n_columns < 2:
        raise ValueError(
            f"'{path}' has {n_rows} rows and {n_columns} columns; a table needs 3 rows and 2 columns at least"
        )
    if not np.isfinite(table).all():
        raise ValueError(f"'{path}' holds values that are not finite; remove those rows")
    return table
