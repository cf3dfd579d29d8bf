"""Things that are chosen by name: registries that others can add to, closed choices, and the error for an unknown name."""

from __future__ import annotations

import difflib
import re
from collections.abc import Hashable, Iterable, Iterator, Mapping
from enum import Enum
from typing import TypeVar

T = TypeVar("T")


def nearest(name: object, known: Iterable[str], cutoff: float = 0.6) -> str | None:
    """The known name that is most similar to another; None where no similarity exceeds `cutoff`, from 0 to 1."""
    found = difflib.get_close_matches(str(name), list(known), n=1, cutoff=cutoff)
    return found[0] if found else None


def unknown_name(kind: str, name: object, known: Iterable[str], *, cutoff: float = 0.6, hint: str = "") -> ValueError:
    """The error for a name that is not among the known ones: which kind of thing was named, what may be meant, what there is, and what else
    may be given.
    """
    known = list(known)
    if not known:
        return ValueError(f"unknown {kind} {name!r}; there is none to choose.")
    near = nearest(name, known, cutoff)
    lead = ": choose" if near is None else f"; did you mean {near!r}? Choose"
    return ValueError(f"unknown {kind} {name!r}{lead} one of {', '.join(map(repr, known))}{hint}.")


class Registry(Mapping[str, T]):
    """Things of one kind by name; another is added by one call to `register`.

    Args:
        kind: what they are, for messages.
        members: those that are known from the start.
        hint: what else may be given, as in ", or pass a `Backend`".
    """

    def __init__(self, kind: str, members: Mapping[str, T] | None = None, hint: str = ""):
        self.kind = kind
        self.hint = hint
        self._members = dict(members or {})

    def register(self, name: str, member: T) -> None:
        """Add a member.

        Raises:
            TypeError: the name is no string.
            ValueError: the name is already taken.
        """
        if not isinstance(name, str):  # pyright: ignore[reportUnnecessaryIsInstance]
            raise TypeError(f"the name of a {self.kind} must be a string, got {name!r}.")
        if self._members.get(name, member) is not member:
            raise ValueError(f"there is another {self.kind} {name!r}; choose another name.")
        self._members[name] = member

    def unregister(self, name: str) -> T:
        """Remove a member and return it; raises `ValueError` where there is none of that name."""
        member = self[name]
        del self._members[name]
        return member

    def __getitem__(self, name: str) -> T:
        """The member of a name; raises `ValueError`, with the names that exist, for an unknown one."""
        if name not in self:
            raise unknown_name(self.kind, name, self._members, hint=self.hint)
        return self._members[name]

    def __contains__(self, name: object) -> bool:
        return isinstance(name, Hashable) and name in self._members

    def __iter__(self) -> Iterator[str]:
        return iter(self._members)

    def __len__(self) -> int:
        return len(self._members)

    def __repr__(self) -> str:
        return f"Registry({self.kind}: {', '.join(self._members)})"


class Choice(str, Enum):
    """An option that takes one of a few strings; any other string raises `ValueError` with the valid ones.

    In messages it is named after its class, written as options are, `PredType` as "pred_type".
    """

    @classmethod
    def _missing_(cls, value: object) -> Choice:
        kind = re.sub(r"(?<=[a-z])(?=[A-Z])", "_", cls.__name__).lower()
        raise unknown_name(kind, value, [member.value for member in cls], hint=cls._hint())

    @classmethod
    def _hint(cls) -> str:
        """What else may be given, see `Registry`."""
        return ""
