"""A plugin of pytest that puts `laplace_ws.compat.laplace_torch` in the place of `laplace`, and notes how each test ended."""

from __future__ import annotations

import importlib
import json
import os
import sys
from importlib.abc import Loader, MetaPathFinder
from importlib.machinery import ModuleSpec
from types import ModuleType
from typing import Any

THEIRS, OURS = "laplace", "laplace_ws.compat.laplace_torch"
OUTCOMES = "PEER_SUITE_OUTCOMES"
"""The variable of the environment that names the file for how the tests ended."""


class Alias(MetaPathFinder, Loader):
    """Finds our modules under their names."""

    def find_spec(self, fullname: str, path: Any, target: Any = None) -> ModuleSpec | None:
        return ModuleSpec(fullname, self) if fullname.partition(".")[0] == THEIRS else None

    def create_module(self, spec: ModuleSpec) -> ModuleType:
        module = importlib.import_module(OURS + spec.name.removeprefix(THEIRS))
        self._own_spec = module.__spec__
        return module

    def exec_module(self, module: ModuleType) -> None:
        module.__spec__ = self._own_spec  # the import has put its own in place


_outcomes: dict[str, str] = {}


def pytest_configure() -> None:
    sys.meta_path.insert(0, Alias())


def pytest_runtest_logreport(report: Any) -> None:
    if report.when == "call" or report.outcome != "passed":
        is_marked = hasattr(report, "wasxfail")
        _outcomes[report.nodeid] = "passed" if is_marked and report.outcome == "skipped" else report.outcome


def pytest_collectreport(report: Any) -> None:
    if report.failed:
        _outcomes[report.nodeid] = "failed"


def pytest_sessionfinish() -> None:
    if OUTCOMES in os.environ:
        with open(os.environ[OUTCOMES], "w") as file:
            json.dump(_outcomes, file)
