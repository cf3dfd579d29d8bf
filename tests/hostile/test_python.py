"""Hostile input to every public entry in Python: each gets its own sentence, whole, and nothing of it gets through in silence."""

from __future__ import annotations

import warnings

import pytest
import torch
from hostile import namespace, tables

TABLES = ("constructor", "fits", "predictions", "training", "optim", "data", "estimators")
CASES = [case for table in TABLES for case in tables.read(table)]


@pytest.fixture(scope="module")
def names():
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return namespace.names()


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("case", CASES, ids=[case.id for case in CASES])
def test_hostile_input_gets_its_sentence(case, names):
    torch.manual_seed(0)
    with pytest.raises(Exception) as raised:  # noqa: PT011 - the row says which, and the whole message
        eval(case.call, dict(names))
    assert f"{type(raised.value).__name__}: {raised.value}" == case.answer


def test_there_are_enough_of_them():
    assert len({case.call for case in CASES}) == len(CASES) >= 150
