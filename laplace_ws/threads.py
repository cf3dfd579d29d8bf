"""What several threads share, models and settings of the process: who may use it, and who waits."""

from __future__ import annotations

import os
from collections.abc import Callable, Collection, Hashable, Iterator
from contextlib import AbstractContextManager, ExitStack, contextmanager
from threading import Condition, Lock, get_ident

from torch import nn


class Turns:
    """Things that one thread at a time may use, again and again within its turn; all that it asks for at once it gets at once.

    Threads that would wait for each other for ever get an error instead.
    """

    def __init__(self) -> None:
        self._lock = Lock()
        self._changed = Condition(self._lock)
        self._owners: dict[Hashable, int] = {}
        self._wanted: dict[int, Collection[Hashable]] = {}  # by threads that wait

    def taking(self, things: Collection[object], refusal: str | None = None) -> _Turn:
        """A context to enter which is to wait until no other thread uses any of these, and which keeps others from using them.

        Args:
            things: told apart by identity.
            refusal: the message of the `RuntimeError` that is raised instead of waiting; by default there is a wait.
        """
        return _Turn(self, things, refusal)

    def take(self, keys: Collection[Hashable], refusal: str | None) -> Collection[Hashable]:
        """Returns what this thread did not have before."""
        me, owners = get_ident(), self._owners
        with self._lock:
            if owners.keys().isdisjoint(keys):
                taken = keys
            else:
                while any(owners.get(key, me) != me for key in keys):
                    if refusal is not None:
                        raise RuntimeError(refusal)
                    self._wait(me, keys)
                taken = [key for key in keys if key not in owners]
            owners.update(dict.fromkeys(taken, me))
            return taken

    def give_back(self, keys: Collection[Hashable]) -> None:
        """Let others have what was taken."""
        with self._lock:
            for key in keys:
                self._owners.pop(key, None)  # gone already in a process that was forked within
            if self._wanted:
                self._changed.notify_all()

    def _wait(self, me: int, keys: Collection[Hashable]) -> None:
        if self._waits_for(me, keys, set()):
            raise RuntimeError(
                "two threads wait for each other: each runs a model of which a forward pass, a hook or a likelihood runs the model of "
                "the other; run one of them at a time."
            )
        self._wanted[me] = keys
        try:
            self._changed.wait()
        finally:
            del self._wanted[me]

    def _waits_for(self, me: int, keys: Collection[Hashable], seen: set[int]) -> bool:
        """Whether an owner of these waits for this thread, itself or through others."""
        for owner in {self._owners[key] for key in keys if key in self._owners} - {me} - seen:
            seen.add(owner)
            wanted = self._wanted.get(owner, ())
            if any(self._owners.get(key) == me for key in wanted) or self._waits_for(me, wanted, seen):
                return True
        return False


class _Turn:
    """A context in which a thread has some of the things of `Turns`; entered at every step, hence no generator."""

    __slots__ = ("_refusal", "_taken", "_things", "_turns")

    def __init__(self, turns: Turns, things: Collection[object], refusal: str | None) -> None:
        self._turns, self._things, self._refusal = turns, things, refusal
        self._taken: Collection[Hashable] = ()

    def __enter__(self) -> None:
        self._taken = self._turns.take(list(map(id, self._things)), self._refusal)

    def __exit__(self, *error: object) -> None:
        self._turns.give_back(self._taken)


_turns = Turns()
_trained = Turns()
_libraries, _random_state = object(), object()


def alone_with(model: nn.Module) -> AbstractContextManager[None]:
    """Keep other threads from running this model, or one that has modules in common with it, until the context ends.

    For whatever sets modes, flags or hooks of modules, or relies on them; threads with other models go on. Not to be held while a loader
    is asked for its next batch, which may run models too.
    """
    return _turns.taking(tuple(model.modules()))


def alone_with_modules(modules: Collection[nn.Module]) -> AbstractContextManager[None]:
    """`alone_with` for the modules of a model, where they have been listed before."""
    return _turns.taking(modules)


def alone_in_libraries() -> AbstractContextManager[None]:
    """Keep other threads from what relies on the global state of a library, such as BackPACK, until the context ends."""
    return _turns.taking((_libraries,))


def alone_with_random_state() -> AbstractContextManager[None]:
    """Keep other threads from what draws from torch's global random state and puts it back, until the context ends."""
    return _turns.taking((_random_state,))


def trained_by_one(model: nn.Module) -> AbstractContextManager[None]:
    """Refuse, with a `RuntimeError`, a training of a model that another thread is training."""
    return _trained.taking(
        tuple(model.modules()),
        refusal=f"{type(model).__name__} is being trained by another thread; wait for its end, or train a copy (copy.deepcopy(model)).",
    )


class SharedSetting:
    """A setting of the process that several threads may need at once: made by the first of them, undone by the last.

    Args:
        make: makes a context with the setting.
    """

    def __init__(self, make: Callable[[], AbstractContextManager[object]]) -> None:
        self._make = make
        self._lock = Lock()
        self._n_users = 0
        self._stack = ExitStack()

    @contextmanager
    def __call__(self) -> Iterator[None]:
        """A context with the setting."""
        with self._lock:
            if not self._n_users:
                self._stack.enter_context(self._make())
            self._n_users += 1
        try:
            yield
        finally:
            with self._lock:
                self._n_users -= 1
                if not self._n_users:
                    self._stack.close()


def _begin_anew() -> None:
    """In a process that was forked the other threads, and what they had, are gone."""
    _turns.__init__()
    _trained.__init__()


if hasattr(os, "register_at_fork"):  # not on Windows, which does not fork
    os.register_at_fork(after_in_child=_begin_anew)
