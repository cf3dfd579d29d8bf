"""Run the whole suite on several Pythons, each with the oldest and the newest torch that is allowed; prints one line for each.

    python scripts/test_matrix.py python3.10 python3.13

Each cell has an environment of its own, several GB that are removed after it.
"""

from __future__ import annotations

import configparser
import datetime
import re
import subprocess
import sys
import tempfile
from pathlib import Path

ROOT = Path(__file__).parent.parent
SEEN = "import platform, torch; print(platform.python_version(), torch.__version__)"


def oldest_torch() -> str:
    """The oldest torch that setup.cfg allows, as a requirement."""
    config = configparser.ConfigParser()
    config.read(ROOT / "setup.cfg")
    (version,) = re.findall(r"^torch>=([\d.]+)$", config["options"]["install_requires"], flags=re.MULTILINE)
    return f"torch=={version}.*"


def cell(python: str, torch: str) -> tuple[str, bool]:
    """Install and test; what is to be said of it, and whether all passed."""
    today = datetime.date.today().isoformat()
    with tempfile.TemporaryDirectory() as folder:
        own = str(Path(folder) / "bin" / "python")
        try:
            subprocess.run([python, "-m", "venv", folder], check=True)
            subprocess.run([own, "-m", "pip", "install", "--quiet", f"{ROOT}[test,docs]", torch], check=True)
            seen = subprocess.run([own, "-c", SEEN], check=True, capture_output=True, text=True).stdout.split()
        except (OSError, subprocess.CalledProcessError) as error:
            return f"{today}: {python}, {torch}: not installed ({error})", False
        done = subprocess.run([own, "-m", "pytest", "-n", "2"], cwd=ROOT, stdout=subprocess.PIPE, text=True)
    print(done.stdout, file=sys.stderr)
    last = next(
        (line for line in reversed(done.stdout.splitlines()) if re.search(r"passed|failed|error", line)), "no result"
    )
    return f"{today}: Python {seen[0]}, torch {seen[1]}: {last.strip('= ')}", done.returncode == 0


def main(pythons: list[str]) -> int:
    passed = True
    for python in pythons:
        for torch in (oldest_torch(), "torch"):
            line, is_good = cell(python, torch)
            print(line, flush=True)
            passed = passed and is_good
    return 0 if passed else 1


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
