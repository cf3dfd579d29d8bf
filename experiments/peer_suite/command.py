"""Run the suite, and count how its tests end."""

from __future__ import annotations

import fnmatch
import json
import os
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from study import read_config, write_result

from peer_suite.alias import OUTCOMES

ROOT = Path(__file__).parents[2]

GROUPS: tuple[tuple[str, str, str], ...] = (
    ("*functional_laplace*", "function space", "posteriors in function space are not offered"),
    ("*test_serialize*functional*", "function space", "posteriors in function space are not offered"),
    (
        "*test_map_location*",
        "of theirs alone",
        "torch.load of a whole object, which torch refuses since 2.6: theirs fails as well",
    ),
    ("*test_curv_backends_*", "internals", "curvature of single batches"),
    ("*test_jacobians*", "internals", "Jacobians of single batches"),
    ("*test_matrix*", "internals", "the classes of Kronecker factors"),
    ("*test_utils*", "internals", "small functions"),
    ("*test_feature_extractor*", "internals", "the wrapper of the last layer"),
)
"""Tests that do not count, by name: the group, and why; the first that fits."""
PUBLIC = "public interface"
REFUSALS = {
    "*test_incompatible_backend*": "asks for an error where ours works: BackPACK and ASDL beside frozen parameters",
    "*test_dict_data*": "asks for an error where ours works: batches that are mappings, with BackPACK or the diagonal empirical Fisher",
}
"""Tests that count and fail, by name, and what is known of them."""


@dataclass(frozen=True)
class SuiteConfig:
    """What is run.

    Attributes:
        path: a checkout of laplace-torch, whose folder `tests` is copied and run; the rest of it is not read.
        select: files or tests below `tests`; all of them where empty.
        out: folder of the results.
    """

    path: str = ""
    select: tuple[str, ...] = ()
    out: str = "runs"


def outcomes(config: SuiteConfig) -> dict[str, str]:
    """How each test ended: "passed", "failed" or "skipped"."""
    tests = Path(config.path) / "tests"
    if not (tests / "test_baselaplace.py").exists():
        sys.exit(f"error: '{config.path}' is no checkout of laplace-torch: it has no tests/test_baselaplace.py")
    with tempfile.TemporaryDirectory() as folder:
        shutil.copytree(tests, Path(folder) / "tests")
        found = Path(folder) / "outcomes.json"
        environment = {**os.environ, OUTCOMES: str(found), "PYTHONPATH": f"{ROOT}{os.pathsep}{ROOT / 'experiments'}"}
        options = ["-q", "-p", "peer_suite.alias", "-p", "no:cacheprovider", "--tb=line", "--disable-warnings"]
        chosen = [f"tests/{name}" for name in config.select] or ["tests"]
        subprocess.run([sys.executable, "-m", "pytest", *options, *chosen], cwd=folder, env=environment, check=False)
        if not found.exists():
            sys.exit("error: pytest ended before it had run the tests")
        return json.loads(found.read_text())


def group_of(test: str) -> tuple[str, str]:
    """The group of a test, and why it does not count; no reason where it does."""
    return next(((group, why) for name, group, why in GROUPS if fnmatch.fnmatchcase(test, name)), (PUBLIC, ""))


def summary(found: Mapping[str, str]) -> dict[str, Any]:
    """Counts by group, the failures of those that count, and why the others do not."""
    counts: dict[str, dict[str, int]] = {}
    for test, outcome in found.items():
        of_group = counts.setdefault(group_of(test)[0], {"passed": 0, "failed": 0, "skipped": 0})
        of_group[outcome] += 1
    failed = [test for test, outcome in found.items() if outcome == "failed" and group_of(test)[0] == PUBLIC]
    known = {
        test: next((why for name, why in REFUSALS.items() if fnmatch.fnmatchcase(test, name)), "") for test in failed
    }
    public = counts.get(PUBLIC, {"passed": 0, "failed": 0, "skipped": 0})
    n_run = public["passed"] + public["failed"]
    return {
        "pass_rate": public["passed"] / n_run if n_run else None,
        "counts": counts,
        "failed": known,
        "left_aside": {
            group: sorted({why for _, g, why in GROUPS if g == group}) for group in counts if group != PUBLIC
        },
    }


def as_text(result: Mapping[str, Any]) -> str:
    """What is printed."""
    lines = ["| tests of | passed | failed | skipped |", "|---|---|---|---|"]
    for group, n in result["counts"].items():
        lines.append(f"| {group} | {n['passed']} | {n['failed']} | {n['skipped']} |")
    lines += [f"left aside, {group}: {'; '.join(whys)}" for group, whys in result["left_aside"].items()]
    by_reason: dict[str, int] = {}
    for why in result["failed"].values():
        by_reason[why or "not known"] = by_reason.get(why or "not known", 0) + 1
    lines += [f"failed, {n}: {why}" for why, n in by_reason.items()]
    if result["pass_rate"] is not None:
        lines.append(f"of the {PUBLIC}: {100 * result['pass_rate']:.1f} % pass")
    return "\n".join(lines)


def main(description: str | None) -> None:
    """The command, whose first argument may be the path."""
    if len(sys.argv) > 1 and not sys.argv[1].startswith("-"):
        sys.argv.insert(1, "--path")
    config = read_config(SuiteConfig, description)
    result = summary(outcomes(config))
    print(as_text(result))
    write_result(SuiteConfig("", config.select, config.out), "peer_suite", result)
