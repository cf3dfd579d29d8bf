"""The table of what each backend covers says what the conformance suite holds."""

import pytest
from backend_coverage import BACKEND_NAMES, DOCUMENTS, REFUSED, ROWS, with_table
from cases import CASES, LINEAR_CASES, WIDE_RESNETS

NAMES = [case.name for case in (*CASES, *LINEAR_CASES, *WIDE_RESNETS)]


def test_every_case_is_in_one_line():
    listed = [name for names in ROWS.values() for name in names]
    assert len(set(NAMES)) == len(NAMES)
    assert sorted(listed) == sorted(NAMES)


def test_every_refusal_is_of_a_case_and_a_backend():
    assert list(REFUSED) == BACKEND_NAMES
    assert {name for refused in REFUSED.values() for name in refused} <= set(NAMES)


@pytest.mark.parametrize("path", DOCUMENTS, ids=lambda path: path.name)
def test_documents_hold_the_table(path):
    text = path.read_text()
    assert text == with_table(text), "run python tests/backend_coverage.py"
