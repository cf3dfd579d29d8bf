"""Files of tensors and plain values: replaced as a whole, sealed by a digest, and read without running code from them.

A file is what `torch.save` writes, a zip archive, with its SHA-256 as the archive's comment: `torch.load(path, weights_only=True)` reads it
without this module. Here the digest is compared first, so that a change of any bit of the file is found.
"""

from __future__ import annotations

import errno
import hashlib
import os
import pickletools
import struct
import zipfile
from collections import Counter, OrderedDict
from collections.abc import Generator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any, BinaryIO, cast

import torch
from torch import Tensor, nn

try:
    import fcntl
except ImportError:  # pragma: no cover  # Windows: two writers of one file are not kept apart
    fcntl = None

_SEAL = b"laplace_ws sha256 "
_SEAL_SIZE = len(_SEAL) + 2 * hashlib.sha256().digest_size
_COMMENT_SIZE = struct.pack("<H", _SEAL_SIZE)
"""The last field of the record that ends a zip archive: how long the comment is that follows."""
_END_SIGNATURE, _END_SIZE = b"PK\5\6", 22
_CHUNK = 2**18
_SCALARS = {type(None), bool, int, float, complex, str, torch.Size, torch.device, torch.dtype}
_DTYPES = {
    *(torch.bool, torch.uint8, torch.int8, torch.int16, torch.int32, torch.int64),
    *(torch.float16, torch.bfloat16, torch.float32, torch.float64, torch.complex64, torch.complex128),
}
_KNOWN = {
    "torch._utils _rebuild_tensor_v2",
    "torch._utils _rebuild_parameter",
    "torch Size",
    "torch device",
    "collections OrderedDict",
    "collections Counter",
    "_codecs encode",
    "__builtin__ set",
    "__builtin__ complex",
    *(f"torch {kind}Storage" for kind in ("Bool", "Byte", "Char", "Short", "Int", "Long")),
    *(f"torch {kind}Storage" for kind in ("Half", "BFloat16", "Float", "Double", "ComplexFloat", "ComplexDouble")),
    *(f"torch {name}" for name, value in vars(torch).items() if isinstance(value, torch.dtype)),
}
"""What a pickle of tensors and plain values refers to. None of it can be made to take more memory than the file is long."""


class FileFormatError(RuntimeError):
    """A file is damaged, or is not of the requested kind."""


def save_tensors(path: str | Path, state: dict[str, Any]) -> None:
    """Write `state` (tensors and plain values), sealed, so that `path` is at every moment the old file or the new one.

    Tensors are written as they are on the CPU.

    Raises:
        OSError: the disk is full or the place cannot be written; what was there is untouched.
        TypeError: the state holds something that could not be read back; what was there is untouched.
    """
    try:
        state = _plain(state, "")
    except TypeError as error:
        message = f"'{path}' can hold tensors and plain values only, but {error}; convert it or leave it out."
        raise TypeError(message) from error
    with replacing(path) as file:
        try:
            torch.save(state, file)
        except RuntimeError as error:
            # torch closes its archive even after an error, and what fails then hides the cause
            raise (error.__context__ if isinstance(error.__context__, OSError) else error) from None
        size = file.seek(0, os.SEEK_END) - len(_COMMENT_SIZE)
        seal = _seal(file, size)
        file.seek(size)
        file.write(_COMMENT_SIZE + seal)


def load_tensors(path: str | Path, kind: str) -> dict[str, Any]:
    """Read what `save_tensors` wrote, to the CPU.

    The digest, and the sizes of all parts against that of the file, are checked before anything is unpacked. Files that
    `torch.save` wrote without a digest, as this package did up to version 0.1.0, are read too.

    Args:
        path: the file.
        kind: what it should hold, as in "a posterior", for messages.

    Raises:
        FileNotFoundError: there is none.
        FileFormatError: it cannot be read, is damaged, or holds something other than a dictionary of tensors and plain values.
    """
    path = Path(path)
    try:
        file = path.open("rb")
    except FileNotFoundError as error:
        raise _explained(error, f"'{path}' cannot be read as {kind}: there is no such file.") from error
    except OSError as error:
        raise FileFormatError(f"'{path}' cannot be read as {kind} ({_reason(error)}).") from error
    with file:
        try:
            state = _read(file)
        except MemoryError:
            raise
        except Exception as error:  # whatever the bytes of another kind of file make the readers raise
            raise FileFormatError(
                f"'{path}' cannot be read as {kind}: it is damaged, cut off, or another kind of file."
            ) from error
    if not isinstance(state, dict):
        raise FileFormatError(f"'{path}' holds a {type(state).__name__} and not {kind}.")
    return cast(dict[str, Any], state)


@contextmanager
def replacing(path: str | Path) -> Generator[BinaryIO, None, None]:
    """A file to write, which takes the place of `path` as a whole once it is complete and on the disk.

    Until then it stands beside it as `<name>.partial`. After an exception it is removed, and `path` is as it was; what a killed process
    leaves, the next writer overwrites. Of two writers of the same file, one waits for the other.

    Raises:
        OSError: of the kind that the system gave, with a sentence that names the file.
    """
    path = Path(path)
    try:
        if path.is_dir():
            raise IsADirectoryError(errno.EISDIR, os.strerror(errno.EISDIR))
        partial = path.with_name(f"{path.name}.partial")
        with _only_writer(partial):
            try:
                with partial.open("w+b") as file:
                    yield file
                    file.flush()
                    os.fsync(file.fileno())
                os.replace(partial, path)
            except BaseException:
                partial.unlink(missing_ok=True)
                raise
    except OSError as error:
        message = f"'{path}' cannot be written ({_reason(error)}); make room or choose another place, nothing there was changed."
        raise _explained(error, message) from error


@contextmanager
def _only_writer(partial: Path) -> Generator[None, None, None]:
    """Wait until no other process or thread writes this file, where the system has locks; a process that is killed loses its own."""
    if fcntl is None:  # pragma: no cover
        yield
        return
    while True:
        descriptor = os.open(partial, os.O_RDWR | os.O_CREAT, 0o666)
        try:
            with suppress(OSError):  # a file system without locks
                fcntl.flock(descriptor, fcntl.LOCK_EX)
            if _is_at(partial, descriptor):
                yield
                return
        finally:
            os.close(descriptor)


def _is_at(path: Path, descriptor: int) -> bool:
    """Whether an open file is still at a path; the writer before may have moved it into place."""
    try:
        return os.path.samestat(path.stat(), os.fstat(descriptor))
    except FileNotFoundError:
        return False


def _read(file: BinaryIO) -> Any:
    if not _is_whole(file):
        raise ValueError("the digest is that of another content, or the end is missing")
    _check_content(file)
    file.seek(0)
    return torch.load(file, map_location="cpu", weights_only=True)


def _is_whole(file: BinaryIO) -> bool:
    """Whether the digest is that of the content; or whether a file without one, as was written before, has an end."""
    size = file.seek(0, os.SEEK_END) - _SEAL_SIZE - len(_COMMENT_SIZE)
    file.seek(max(0, size))
    tail = file.read()
    if tail[len(_COMMENT_SIZE) :].startswith(_SEAL):
        return tail == _COMMENT_SIZE + _seal(file, size)
    end = tail[-_END_SIZE:]
    return end.startswith(_END_SIGNATURE) and end.endswith(b"\0\0")


def _seal(file: BinaryIO, size: int) -> bytes:
    """The comment of an archive whose bytes up to the size of its comment are the first `size` of a file."""
    digest = hashlib.sha256()
    file.seek(0)
    while size and (chunk := file.read(min(_CHUNK, size))):
        digest.update(chunk)
        size -= len(chunk)
    return _SEAL + digest.hexdigest().encode()


def _check_content(file: BinaryIO) -> None:
    """Raise an exception unless a file is an archive that unpacks to no more than its own size, to tensors and plain values."""
    size = file.seek(0, os.SEEK_END)
    with zipfile.ZipFile(file) as archive:
        entries = archive.infolist()
        if any(e.compress_type != zipfile.ZIP_STORED or e.compress_size != e.file_size for e in entries):
            raise ValueError("an entry is compressed")
        if min(e.header_offset for e in entries) or sum(e.file_size for e in entries) > size:
            raise ValueError("the entries are not those of this file")
        (content,) = (e for e in entries if e.filename.lower().endswith("/data.pkl"))
        operations = pickletools.genops(archive.read(content))
        if unknown := {name for operation, name, _ in operations if operation.name == "GLOBAL"} - _KNOWN:
            raise ValueError(f"it refers to {unknown}")


def _plain(value: Any, name: str) -> Any:
    """A state with its tensors on the CPU, so that it can be read anywhere; raises `TypeError` for what could not be read back."""
    if isinstance(value, Tensor) and value.device.type != "cpu" and not value.is_meta:
        value = value.detach().cpu()
    kind = cast(Any, type(value))
    if kind in (dict, OrderedDict, Counter):
        entries = cast(dict[Any, Any], value).items()
        return cast(
            Any, kind({_plain(k, f"the key {k!r}"): _plain(v, f"{name}.{k}" if name else str(k)) for k, v in entries})
        )
    if kind in (list, tuple, set):
        return cast(Any, kind([_plain(entry, f"{name}[{i}]") for i, entry in enumerate(cast(list[Any], value))]))
    if kind in (Tensor, nn.Parameter):
        if value.dtype not in _DTYPES or value.layout != torch.strided or value.is_meta or value.__dict__:
            raise TypeError(
                f"{name} is a tensor with {value.dtype}, {value.layout} and attributes {list(value.__dict__)}"
            )
    elif kind not in _SCALARS and not (kind is bytes and value):
        raise TypeError(f"{name} is a {kind.__name__}")
    return value


def _reason(error: OSError) -> str:
    reason = error.strerror or str(error)
    return reason[:1].lower() + reason[1:]


def _explained(error: OSError, message: str) -> OSError:
    """An error of the same kind with another message."""
    explained = type(error)(message)
    explained.errno = error.errno
    return explained
