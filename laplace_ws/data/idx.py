"""The IDX format of MNIST and its siblings."""

from __future__ import annotations

import gzip
import math
import struct
from pathlib import Path

import numpy as np

_UNSIGNED_BYTE = 0x08


def read_idx(path: str | Path) -> np.ndarray:
    """Read a gzipped IDX file of unsigned bytes.

    The file starts with two zero bytes, one byte for the element type, one for the number of dimensions, and one
    big-endian 32-bit length per dimension; the elements follow in row-major order.

    Returns:
        A writable uint8 array, for instance `[N, H, W]` for images and `[N]` for labels.

    Raises:
        ValueError: the file is not an IDX file of unsigned bytes, or its length contradicts its header.

    Source: http://yann.lecun.com/exdb/mnist ("the IDX file format").
    """
    with gzip.open(path, "rb") as file:
        content = file.read()
    if len(content) < 4 or content[:3] != bytes((0, 0, _UNSIGNED_BYTE)):
        raise ValueError(f"'{path}' is not an IDX file of unsigned bytes; fetch it again")
    n_dims = content[3]
    header = 4 + 4 * n_dims
    if len(content) < header:
        raise ValueError(f"'{path}' ends inside its header; fetch it again")
    shape = struct.unpack(f">{n_dims}I", content[4:header])
    if len(content) - header != math.prod(shape):
        raise ValueError(f"'{path}' holds {len(content) - header} bytes, its header says {shape}; fetch it again")
    return np.frombuffer(content, dtype=np.uint8, offset=header).reshape(shape).copy()
