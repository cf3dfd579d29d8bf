"""Files of tensors and plain values: what is read is what was written, whole or not at all, within the memory that the file takes."""

import errno
import os
import pickle
import subprocess
import sys
import textwrap
import threading
import zipfile
from collections import Counter, OrderedDict
from contextlib import contextmanager, nullcontext

import numpy as np
import pytest
import torch
from damage import files_of_at_most
from torch import nn

from laplace_ws import files
from laplace_ws.files import FileFormatError, load_tensors, replacing, save_tensors

SHARED = torch.arange(12.0)
DTYPES = [torch.float32, torch.float64, torch.bfloat16, torch.float16, torch.complex64, torch.complex128]
DTYPES += [torch.bool, torch.uint8, torch.int8, torch.int16, torch.int32, torch.int64]


def same(got, want) -> bool:
    if type(got) is not type(want):
        return False
    if isinstance(want, dict):
        return list(got) == list(want) and all(same(got[key], want[key]) for key in want)
    if isinstance(want, (list, tuple)):
        return len(got) == len(want) and all(map(same, got, want))
    if isinstance(want, torch.Tensor):
        return got.dtype == want.dtype and got.shape == want.shape and torch.equal(got, want)
    return repr(got) == repr(want)  # NaN too, and −0.0


@pytest.mark.parametrize(
    "value",
    [
        *(torch.tensor([[0, 1], [1, 2]]).to(dtype) for dtype in DTYPES),
        torch.tensor(2.5, dtype=torch.float64),
        torch.zeros(0, 3),
        torch.arange(6.0).reshape(2, 3).mT,
        torch.tensor(1.5).expand(4),
        torch.complex(torch.ones(2), torch.ones(2)).conj(),
        nn.Parameter(torch.ones(2)),
        [SHARED, SHARED[3:], SHARED.reshape(3, 4)[:, 1]],
        {0: {"step": 3, "more": [1, (2, None), {}]}, -1: True, 2.5: False, None: "ä\ud800\0", ("a", 1): ""},
        [float("nan"), float("inf"), -float("inf"), -0.0, 5e-324, 0.1, 2**80, -1, 1j],
        OrderedDict(b=1, a=2),
        Counter("aab"),
        {1, 2},
        b"bytes",
        torch.Size([2, 3]),
        torch.device("cuda:1"),
        torch.bfloat16,
    ],
    ids=lambda value: str(value)[:40],
)  # fmt: skip
def test_what_is_read_is_what_was_written(value, tmp_path):
    path = tmp_path / "a.pt"
    save_tensors(path, {"value": value})
    assert same(load_tensors(path, "a state")["value"], value)
    assert same(torch.load(path, weights_only=True)["value"], value)  # a file of torch's all the same


def test_tensors_that_share_memory_share_it_again(tmp_path):
    save_tensors(tmp_path / "a.pt", {"all": SHARED, "part": SHARED[3:]})
    state = load_tensors(tmp_path / "a.pt", "a state")
    state["all"][3] = -1
    assert state["part"][0] == -1


class Label(str):
    pass


def with_attribute():
    tensor = torch.ones(2)
    tensor.note = "mine"
    return tensor


@pytest.mark.parametrize(
    ("value", "says"),
    [
        (np.float64(1), r"optimizer\.0\.lr is a float64"),
        (Label("a"), r"optimizer\.0\.lr is a Label"),
        ([1, {"f": print}], r"optimizer\.0\.lr\[1\]\.f is a builtin_function"),
        ({Label("a"): 1}, "the key 'a' is a Label"),
        (torch.zeros(2, dtype=torch.float8_e4m3fn), "is a tensor with torch.float8_e4m3fn"),
        (torch.zeros(2, 2).to_sparse(), "is a tensor with .*torch.sparse_coo"),
        (with_attribute(), r"attributes \['note'\]"),
        (b"", "is a bytes"),
    ],
)  # fmt: skip
def test_what_could_not_be_read_back_is_refused_by_name_and_nothing_is_changed(value, says, tmp_path):
    path = tmp_path / "a.pt"
    save_tensors(path, {"old": 1})
    with pytest.raises(TypeError, match=says):
        save_tensors(path, {"optimizer": {0: {"lr": value}}})
    assert load_tensors(path, "a state") == {"old": 1}
    assert os.listdir(tmp_path) == ["a.pt"]


# ------------------------------------------------------------------ whole or not at all


@pytest.mark.parametrize("error", [KeyboardInterrupt, RuntimeError("mine"), OSError("mine")])
def test_an_exception_while_writing_leaves_the_old_file_and_no_other(error, tmp_path):
    path = tmp_path / "a.txt"
    path.write_text("old")

    def write():
        with replacing(path) as file:
            file.write(b"new")
            raise error

    with pytest.raises(error if isinstance(error, type) else type(error)):
        write()
    assert path.read_text() == "old"
    assert os.listdir(tmp_path) == ["a.txt"]


def test_what_a_killed_writer_left_is_overwritten(tmp_path):
    path = tmp_path / "a.pt"
    (tmp_path / "a.pt.partial").write_bytes(b"x" * 10**6)
    save_tensors(path, {"new": 1})
    assert load_tensors(path, "a state") == {"new": 1}
    assert os.listdir(tmp_path) == ["a.pt"]


def test_of_two_writers_of_one_file_one_waits_for_the_other(tmp_path):
    path, begun = tmp_path / "a.txt", threading.Event()

    def second():
        begun.set()
        with replacing(path) as file:
            file.write(b"second")

    thread = threading.Thread(target=second)
    with replacing(path) as file:
        file.write(b"fir")
        file.flush()
        thread.start()
        begun.wait()
        thread.join(0.2)
        assert thread.is_alive()
        file.write(b"st")
    thread.join()
    assert path.read_text() == "second"
    assert os.listdir(tmp_path) == ["a.txt"]


def test_many_writers_of_one_file_leave_the_whole_file_of_one(tmp_path):
    path = tmp_path / "a.pt"
    save_tensors(path, {"value": torch.full((10_000,), -1)})

    def write(value):
        for _ in range(10):
            save_tensors(path, {"value": torch.full((10_000,), value)})

    threads = [threading.Thread(target=write, args=(i,)) for i in range(4)]
    for thread in threads:
        thread.start()
    while any(thread.is_alive() for thread in threads):
        assert len(load_tensors(path, "a state")["value"].unique()) == 1
    assert os.listdir(tmp_path) == ["a.pt"]


@pytest.mark.parametrize("place", ["no folder", "folder", "read only"])
def test_a_place_that_cannot_be_written_is_named_in_a_sentence(place, tmp_path):
    path = tmp_path / "a.pt"
    if place == "no folder":
        path = tmp_path / "nowhere" / "a.pt"
    elif place == "folder":
        path.mkdir()
    rights = without_rights(tmp_path) if place == "read only" else nullcontext()
    with rights, pytest.raises(OSError, match="cannot be written") as error:
        save_tensors(path, {"a": 1})
    message = str(error.value)
    assert message.startswith(f"'{path}' cannot be written (")
    assert message.endswith("; make room or choose another place, nothing there was changed.")
    assert "Errno" not in message
    assert error.value.errno in (errno.ENOENT, errno.EISDIR, errno.EACCES)
    assert not list(tmp_path.rglob("*.partial"))


@contextmanager
def without_rights(path):
    """As a user who may not write into a folder, or not read a file."""
    mode, is_superuser = path.stat().st_mode, os.geteuid() == 0
    path.chmod(0o500 if path.is_dir() else 0)
    try:
        if is_superuser:  # to whom the mode means nothing
            os.seteuid(65534)
        yield
    finally:
        if is_superuser:
            os.seteuid(0)
        path.chmod(mode)


# ------------------------------------------------------------------ what cannot be read


@pytest.mark.parametrize("kind", ["empty", "text", "folder", "no permission", "pickle", "bare zip", "list"])
def test_what_is_no_such_file_is_refused_in_a_sentence(kind, tmp_path):
    path = tmp_path / "a.pt"
    if kind == "folder":
        path.mkdir()
    elif kind == "bare zip":
        with zipfile.ZipFile(path, "w") as archive:
            archive.writestr("a/b", "c")
    elif kind == "list":
        torch.save([1], path)
    else:
        path.write_bytes({"text": b"hello", "pickle": pickle.dumps({"a": 1})}.get(kind, b""))
    rights = without_rights(path) if kind == "no permission" else nullcontext()
    with rights, pytest.raises(FileFormatError) as error:
        load_tensors(path, "a state")
    message = str(error.value)
    assert message.startswith(f"'{path}' ")
    assert message.endswith(".")
    assert "\n" not in message
    assert "Errno" not in message


def test_a_file_that_is_not_there_is_named(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"nowhere\.pt' cannot be read as a state: there is no such file\."):
        load_tensors(tmp_path / "nowhere.pt", "a state")


def test_a_file_without_a_digest_is_read_as_before(tmp_path):
    torch.save({"a": torch.ones(2)}, tmp_path / "a.pt")
    assert load_tensors(tmp_path / "a.pt", "a state")["a"].tolist() == [1, 1]


def pickled(*, storage=b"K\x0a", size=b"K\x0a", name=b"ctorch\nFloatStorage\n") -> bytes:
    """The pickle of a vector of 10 numbers, as `torch.save` writes it, with parts replaced."""
    stored = b"(X\x07\0\0\0storage" + name + b"X\x01\0\0\x000X\x03\0\0\0cpu" + storage + b"tQ"
    tensor = b"ctorch._utils\n_rebuild_tensor_v2\n(" + stored + b"K\x00" + size + b"\x85K\x01\x85\x89ccollections\n"
    return b"\x80\x02}X\x01\0\0\0a" + tensor + b"OrderedDict\n)RtRs."


def forged(path, content=None, *, size=40, compression=zipfile.ZIP_STORED) -> None:
    with zipfile.ZipFile(path, "w", compression) as archive:
        archive.writestr("a/data.pkl", pickled() if content is None else content)
        archive.writestr("a/byteorder", "little")
        with archive.open("a/data/0", "w") as record:
            for start in range(0, size, 2**20):
                record.write(bytes(min(2**20, size - start)))
        archive.writestr("a/version", "3\n")


BIG = b"J\0\0\0\x08"  # 2²⁷
START = b"\x80\x02}X\x01\0\0\0a"
BOMBS = {
    "compressed": {"content": pickled(storage=BIG, size=BIG), "size": 2**29, "compression": zipfile.ZIP_DEFLATED},
    "storage": {"content": pickled(storage=BIG, size=BIG)},
    "shape": {"content": pickled(size=BIG)},
    "bytearray": {"content": START + b"c__builtin__\nbytearray\nJ\0\0\0\x20\x85Rs."},
    "new storage": {"content": START + b"ctorch.storage\nUntypedStorage\nJ\0\0\0\x20\x85Rs."},
    "new tensor": {"content": START + b"ctorch._tensor\nTensor\n" + BIG + b"\x85Rs."},
}
"""Small files that would have 512 MiB allocated."""


def test_a_forgery_is_read_where_nothing_is_wrong_with_it(tmp_path):
    forged(tmp_path / "a.pt")
    assert load_tensors(tmp_path / "a.pt", "a state")["a"].shape == (10,)


def test_a_small_file_takes_little_memory(tmp_path):
    """In a process that may take no more than 300 MiB on top of what it has."""
    for name, content in BOMBS.items():
        forged(tmp_path / name, **content)
        assert (tmp_path / name).stat().st_size < 2**20
    program = f"""
        import importlib.util, resource
        import torch
        spec = importlib.util.spec_from_file_location("files", {files.__file__!r})  # without the rest of the package
        files = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(files)
        now = int(open("/proc/self/statm").read().split()[0]) * resource.getpagesize()
        resource.setrlimit(resource.RLIMIT_AS, (now + 300 * 2**20, now + 300 * 2**20))
        peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        for name in {list(BOMBS)}:
            try:
                files.load_tensors({str(tmp_path)!r} + "/" + name, "a state")
            except files.FileFormatError as error:
                print(error)
        print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - peak)
    """
    command = [sys.executable, "-c", textwrap.dedent(program)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    said = done.stdout.splitlines()
    reason = "it is damaged, cut off, or another kind of file"
    assert said[:-1] == [f"'{tmp_path / name}' cannot be read as a state: {reason}." for name in BOMBS]
    assert int(said[-1]) < 50_000  # kB


def test_a_full_disk_is_said_and_changes_nothing(tmp_path):
    path = tmp_path / "a.pt"
    save_tensors(path, {"old": 1})
    with files_of_at_most(20_000), pytest.raises(OSError, match="cannot be written") as error:
        save_tensors(path, {"new": torch.ones(100_000)})
    mend = "make room or choose another place, nothing there was changed"
    assert str(error.value) == f"'{path}' cannot be written (file too large); {mend}."
    assert error.value.errno == errno.EFBIG
    assert load_tensors(path, "a state") == {"old": 1}
    assert os.listdir(tmp_path) == ["a.pt"]
