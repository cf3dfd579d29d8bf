"""Posteriors and checkpoints that are damaged, cut off, or killed and out of space while they are written: found, or as before."""

import os
import random
import signal
import time
from contextlib import ExitStack

import pytest
import torch
from damage import files_of_at_most, flipped
from marglik.runs import QUICK, SGD, blobs, norm_net, state_of
from posterior.shared import STRUCTURES, fitted

from laplace_ws import FileFormatError, load_posterior
from laplace_ws.files import load_tensors, save_tensors
from laplace_ws.marglik import CheckpointError, marglik_training
from laplace_ws.marglik.checkpoint import load_training

OPTIONS = {"optimizer_kwargs": SGD, **QUICK}


class Saved:
    """A posterior or a checkpoint, its file, and how it is read."""

    def __init__(self, kind, folder):
        self.path, self.error = folder / f"{kind}.pt", FileFormatError
        if kind == "checkpoint":
            marglik_training(norm_net(), blobs(), checkpoint_path=self.path, **OPTIONS)
            self.error = CheckpointError
            self.read = load_training
        else:
            la, _, _ = fitted(kind, "mlp", class_names=["a", "b", "c"])
            la.save(self.path)
            self.read = lambda path: load_posterior(path, la.model)
        self.whole = self.path.read_bytes()

    def refused(self, content, place) -> bool:
        """Whether a changed file is refused in a sentence that names it."""
        place.write_bytes(content)
        try:
            self.read(place)
        except self.error as error:
            message = str(error)
            assert message.startswith(f"'{place}' cannot be read as a ")
            assert "\n" not in message
            assert "Errno" not in message
            return True
        return False


@pytest.fixture(scope="module", params=[*STRUCTURES, "checkpoint"])
def saved(request, tmp_path_factory):
    return Saved(request.param, tmp_path_factory.mktemp("saved"))


def test_every_flipped_bit_is_found(saved, attacks, tmp_path):
    bits = random.Random(0).choices(range(8 * len(saved.whole)), k=attacks(1000))
    assert [bit for bit in bits if not saved.refused(flipped(saved.whole, bit), tmp_path / "a.pt")] == []


def test_every_flipped_bit_of_the_end_is_found(saved, tmp_path):
    """Of the record that ends the archive, and of the digest itself: all of them."""
    if saved.path.stem != "diag":
        pytest.skip("the same in all files")
    n_bits = 8 * len(saved.whole)
    bits = range(n_bits - 8 * 104, n_bits)
    assert [bit for bit in bits if not saved.refused(flipped(saved.whole, bit), tmp_path / "a.pt")] == []


def test_a_file_that_is_cut_off_or_longer_is_found(saved, attacks, tmp_path):
    size = len(saved.whole)
    lengths = random.Random(0).sample(range(size), k=attacks(1000))
    lengths += range(size - 110, size)
    contents = {length: saved.whole[:length] for length in [0, 1, *lengths]}
    contents |= {size + 1: saved.whole + b"\0", 2 * size: saved.whole * 2}
    assert [n for n, content in contents.items() if not saved.refused(content, tmp_path / "a.pt")] == []


def test_blocks_that_are_lost_or_swapped_are_found(saved, attacks, tmp_path):
    """As a file system leaves them that lost its power: zeros, or the content of another block."""
    draw = random.Random(0)
    for _ in range(attacks(100)):
        start, other = (draw.randrange(0, len(saved.whole) - 512) for _ in range(2))
        for block in (bytes(512), saved.whole[other : other + 512]):
            content = saved.whole[:start] + block + saved.whole[start + 512 :]
            assert content == saved.whole or saved.refused(content, tmp_path / "a.pt")


def test_a_disk_that_is_full_at_any_place_leaves_the_old_file(saved, attacks, tmp_path):
    path, n_places = tmp_path / "a.pt", attacks(200)
    state = load_tensors(saved.path, "a state")
    save_tensors(path, state)
    whole = path.read_bytes()
    for place in range(n_places):
        limit = len(whole) * place // n_places
        with files_of_at_most(limit), pytest.raises(OSError, match="cannot be written") as error:
            save_tensors(path, state)
        assert str(error.value).startswith(f"'{path}' cannot be written (file too large); ")
        assert path.read_bytes() == whole
        assert os.listdir(tmp_path) == ["a.pt"]
    with files_of_at_most(len(whole)):
        save_tensors(path, state)


def test_a_training_whose_disk_is_full_goes_on_from_the_checkpoint_before(tmp_path, attacks):
    whole = marglik_training(norm_net(), blobs(), **OPTIONS)
    path = tmp_path / "c.pt"
    for place in range(attacks(20)):
        path.unlink(missing_ok=True)

        def fill(record, place=place):
            if record["epoch"] == 4:  # the checkpoint of epoch 2 is there, and the next is longer
                limits.enter_context(files_of_at_most(path.stat().st_size * place // 20))

        with ExitStack() as limits, pytest.raises(OSError, match=r"c\.pt' cannot be written \(file too large\)"):
            marglik_training(norm_net(), blobs(), checkpoint_path=path, on_epoch=fill, **OPTIONS)
        assert os.listdir(tmp_path) == ["c.pt"]
        assert load_training(path)["progress"]["epoch"] == 2
        again = marglik_training(norm_net(), blobs(), checkpoint_path=path, resume=True, **OPTIONS)
        assert again.losses == whole.losses
        assert all(torch.equal(value, again.model.state_dict()[name]) for name, value in state_of(whole.model).items())


def test_writers_that_are_killed_leave_the_old_file_or_the_new_one(tmp_path, attacks):
    path, draw, n_kills, n_in_writing = tmp_path / "a.pt", random.Random(0), attacks(200), 0
    save_tensors(path, contents(0))
    last = 0
    for _ in range(n_kills):
        writer = os.fork()
        if not writer:
            write_for_ever(path, last)
        time.sleep(0.02 * draw.random())
        assert last <= number_in(path)  # while it writes
        os.kill(writer, signal.SIGKILL)
        os.waitpid(writer, 0)
        n_in_writing += path.with_name("a.pt.partial").exists()
        before, last = last, number_in(path)
        assert before <= last
        assert set(os.listdir(tmp_path)) <= {"a.pt", "a.pt.partial"}
    assert last > 0
    assert n_in_writing > n_kills // 10
    save_tensors(path, contents(-1))
    assert os.listdir(tmp_path) == ["a.pt"]


def write_for_ever(path, number):
    try:
        while True:
            number += 1
            save_tensors(path, contents(number))
    finally:
        os._exit(1)


def contents(number):
    return {"number": number, "values": {i: torch.full((2_000,), number) for i in range(50)}}


def number_in(path) -> int:
    """Which of `contents` a file holds, all of it."""
    state = load_tensors(path, "a state")
    assert all(torch.equal(value, contents(state["number"])["values"][i]) for i, value in state["values"].items())
    return state["number"]


def test_a_posterior_whose_writer_is_killed_is_the_old_one_or_the_new_one(tmp_path, attacks):
    la, _, _ = fitted("kron", "mlp")
    path, draw = tmp_path / "la.pt", random.Random(0)
    la.prior_precision = 1
    la.save(path)
    for _ in range(attacks(100)):
        writer = os.fork()
        if not writer:
            save_for_ever(la, path)
        time.sleep(0.02 * draw.random())
        os.kill(writer, signal.SIGKILL)
        os.waitpid(writer, 0)
        assert load_posterior(path, la.model).prior_precision.item() in (1, 2)


def save_for_ever(la, path):
    try:
        while True:
            la.prior_precision = 3 - la.prior_precision
            la.save(path)
    finally:
        os._exit(1)
