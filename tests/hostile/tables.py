"""The tables of hostile input: what is asked for, and, indented, the one sentence that comes back."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

FOLDER = Path(__file__).with_name("tables")
_INDENT, _OF_FILE = "    ", "    |"


@dataclass(frozen=True)
class Case:
    """Hostile input to a public entry.

    Attributes:
        call: an expression in the names of `hostile.namespace`; or what follows `laplace-ws` on the command line.
        answer: name of the exception and its whole message; or the whole line after "laplace-ws: error: ".
        text: of the file `own.yaml` that a command reads, if there is one.
    """

    call: str
    answer: str
    text: str | None = None

    @property
    def id(self) -> str:
        return " ".join([self.call, self.text or ""]).strip()


def read(name: str) -> list[Case]:
    """The rows of a table, which are separated by empty lines; a line after `|` is the text of a file."""
    return [_case(*row.splitlines()) for row in (FOLDER / f"{name}.txt").read_text(encoding="utf-8").split("\n\n")]


def _case(call: str, *lines: str) -> Case:
    *of_file, answer = lines
    text = "\n".join(line.removeprefix(_OF_FILE).strip() for line in of_file) if of_file else None
    return Case(call, answer.removeprefix(_INDENT), text)
