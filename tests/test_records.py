"""Results in files: what a dataclass writes is what it reads, and what is wrong is said in one sentence."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from typing import Any

import pytest

from laplace_ws.records import RecordError, from_dict, read_record


@dataclass(frozen=True)
class Part:
    n: int
    x: float | None = None


@dataclass(frozen=True)
class Whole:
    name: str
    part: Part
    parts: tuple[Part, ...] = ()
    by_name: Mapping[str, Part] = field(default_factory=dict)
    numbers: Mapping[str, float] = field(default_factory=dict)
    is_done: bool = False
    anything: Any = None


WHOLE = Whole("a", Part(1, 0.5), (Part(2), Part(3, 1.0)), {"b": Part(4)}, {"c": 2.0}, True, {"d": [1, "e"]})
VALUES: dict[str, Any] = {"name": "a", "part": {"n": 1}}


def test_what_is_written_is_read():
    assert from_dict(Whole, json.loads(json.dumps(asdict(WHOLE))), "file") == WHOLE
    assert from_dict(Whole, asdict(WHOLE), "file") == WHOLE


def test_defaults_stand_for_what_is_missing_and_more_is_passed_over():
    assert from_dict(Whole, VALUES | {"parts": None, "later": 1}, "file") == Whole("a", Part(1))
    assert type(from_dict(Part, {"n": 1, "x": 2}, "file").x) is float


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"part": {"n": 1}}, "file lacks 'name'; write a text"),
        (VALUES | {"name": 1}, "file: 'name' is 1; write a text"),
        (VALUES | {"part": None}, "file: 'part' is None; write an object"),
        (VALUES | {"part": {}}, "file, part lacks 'n'; write a whole number"),
        (VALUES | {"part": {"n": True}}, "file, part: 'n' is True; write a whole number"),
        (VALUES | {"part": {"n": 1.5}}, "file, part: 'n' is 1.5; write a whole number"),
        (VALUES | {"part": {"n": 1, "x": "low"}}, "file, part: 'x' is 'low'; write a number"),
        (VALUES | {"parts": {}}, "file: 'parts' is {}; write a list"),
        (VALUES | {"parts": [1]}, "file: 'parts[0]' is 1; write an object"),
        (VALUES | {"by_name": {"b": {"n": "1"}}}, "file, by_name, b: 'n' is '1'; write a whole number"),
        (VALUES | {"numbers": {"c": None}}, "file, numbers: 'c' is None; write a number"),
        (VALUES | {"is_done": 1}, "file: 'is_done' is 1; write true or false"),
        ([], "file holds []; write an object"),
    ],
)
def test_what_is_wrong_is_named(values, message):
    with pytest.raises(RecordError) as error:
        from_dict(Whole, values, "file")
    assert str(error.value) == message


def test_what_a_class_refuses_names_the_place():
    @dataclass(frozen=True)
    class Positive:
        n: int

        def __post_init__(self) -> None:
            if self.n < 1:
                raise ValueError("n must be positive")

    with pytest.raises(RecordError, match="file, line 3: n must be positive"):
        from_dict(Positive, {"n": 0}, "file, line 3")


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (None, r"whole\.json cannot be read \(No such file or directory\); look elsewhere"),
        ("{", r"whole\.json is not valid JSON \(.*\); make it anew"),
        ("[1]", r"whole\.json holds no JSON object; make it anew"),
        ('{"format_version": 1}', r"whole\.json has format_version 1, this report reads 2"),
        ('{"format_version": 2}', r"whole\.json lacks 'name'"),
    ],
)
def test_a_file_that_cannot_be_read_is_named(tmp_path, text, message):
    path = tmp_path / "whole.json"
    if text is not None:
        path.write_text(text)
    with pytest.raises(RecordError, match=message):
        read_record(Whole, path, version=2, absent="look elsewhere", broken="make it anew")
