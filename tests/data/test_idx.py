from __future__ import annotations

import gzip

import numpy as np
import pytest

from laplace_ws.data.idx import read_idx


def write(path, content):
    with gzip.open(path, "wb") as file:
        file.write(content)
    return path


def test_reads_row_major_bytes(tmp_path):
    path = write(tmp_path / "a.gz", bytes([0, 0, 8, 2, 0, 0, 0, 2, 0, 0, 0, 3, 1, 2, 3, 4, 5, 255]))
    array = read_idx(path)
    assert array.dtype == np.uint8
    assert array.tolist() == [[1, 2, 3], [4, 5, 255]]


@pytest.mark.parametrize(
    ("content", "problem"),
    [
        (b"", "is not an IDX file"),
        (bytes([0, 0, 13, 1, 0, 0, 0, 0]), "is not an IDX file"),
        (bytes([0, 0, 8, 2, 0, 0, 0, 2]), "ends inside its header"),
        (bytes([0, 0, 8, 1, 0, 0, 0, 2, 7]), "holds 1 bytes"),
    ],
)
def test_broken_files_are_refused(content, problem, tmp_path):
    with pytest.raises(ValueError, match=problem):
        read_idx(write(tmp_path / "a.gz", content))
