"""What the tests of files do to them."""

import resource
from contextlib import contextmanager


@contextmanager
def files_of_at_most(n_bytes):
    """A disk that is full: the system lets this process write no file beyond a size. (Python ignores the signal that comes with it.)"""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (n_bytes, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


def flipped(whole: bytes, bit: int) -> bytes:
    """A file in which one bit, counted from its start, is another."""
    place, shift = divmod(bit, 8)
    return whole[:place] + bytes([whole[place] ^ 1 << shift]) + whole[place + 1 :]
