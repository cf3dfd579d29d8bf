"""A plugin of pytest under which `import laplace` and what is below it give `laplace_ws.compat.laplace_torch`; it notes how each test ended."""

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
"""The variable that names the file for how the tests ended."""


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


sys.meta_path.insert(0, Alias())
_outcomes: dict[str, str] = {}


def pytest_runtest_logreport(report: Any) -> None:
    if report.when == "call" or (report.when == "setup" and report.outcome != "passed"):
        _outcomes[report.nodeid] = "xfailed" if hasattr(report, "wasxfail") else report.outcome


def pytest_collectreport(report: Any) -> None:
    if report.failed:
        _outcomes[report.nodeid] = "failed"


def pytest_sessionfinish() -> None:
    with open(os.environ[OUTCOMES], "w") as file:
        json.dump(_outcomes, file)
