"""Random states, so that draws can be repeated."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from threading import Lock, get_ident

import torch
from torch import Tensor

State = dict[str, Tensor]


@dataclass(eq=False)
class _Found:
    """A global random state as a thread found it, to be put back."""

    thread: int
    device: torch.device
    state: State


_found: list[_Found] = []  # of all threads, the earliest first
_found_lock = Lock()


@contextmanager
def random_state_kept(device: torch.device) -> Iterator[None]:
    """Put torch's global random state back on exit; of several threads that do so, the last puts back what the first has found."""
    mine = _Found(get_ident(), device, random_state(device))
    with _found_lock:
        _found.append(mine)
    try:
        yield
    finally:
        with _found_lock:
            place = _found.index(mine)
            del _found[place]
            others = [found.thread != mine.thread and found.device == device for found in _found]
            if not any(others):
                set_random_state(mine.state, device)
            elif any(others[place:]):
                _found[others.index(True, place)].state = mine.state


@contextmanager
def as_found_by_the_first(device: torch.device) -> Iterator[None]:
    """Draw from the global random state that the threads in `random_state_kept` will leave, whatever they have drawn so far."""
    with _found_lock:
        others = [found.state for found in _found if found.thread != get_ident() and found.device == device]
    if not others:
        yield
        return
    before = random_state(device)
    set_random_state(others[0], device)
    try:
        yield
    finally:
        set_random_state(before, device)


def random_state(device: torch.device, generator: torch.Generator | None = None) -> State:
    """The state of a generator; if none is given, of torch's global generators that a computation on `device` draws from."""
    if generator is not None:
        return {"generator": generator.get_state()}
    state = {"cpu": torch.get_rng_state()}
    if device.type == "cuda":
        state["cuda"] = torch.cuda.get_rng_state(device)
    return state


def set_random_state(state: State, device: torch.device, generator: torch.Generator | None = None) -> None:
    """Restore what `random_state` returned for the same generator."""
    if generator is not None:
        generator.set_state(state["generator"].cpu())
        return
    torch.set_rng_state(state["cpu"].cpu())
    if "cuda" in state:
        torch.cuda.set_rng_state(state["cuda"].cpu(), device)
