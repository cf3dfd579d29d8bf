"""Build the wheel and the source distribution; fails on a warning, and where one of them lacks a file of the package.

python scripts/check_dist.py dist
"""

from __future__ import annotations

import os
import re
import subprocess
import sys
import tarfile
import zipfile
from pathlib import Path

ROOT = Path(__file__).parent.parent


def build(out: Path) -> str:
    """Build both into a folder; what the build says."""
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONDONTWRITEBYTECODE"}
    command = [sys.executable, "-m", "build", "--outdir", str(out), str(ROOT)]
    done = subprocess.run(command, env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    if done.returncode:
        sys.exit(done.stdout)
    return done.stdout


def main(out: Path) -> None:
    said = build(out)
    found = [line for line in said.splitlines() if re.search(r"\b[Ww]arning\b|WARNING|[a-z]Warning\b", line)]
    (wheel,), (archive,) = out.glob("laplace_ws-*.whl"), out.glob("laplace_ws-*.tar.gz")
    wanted = {p.relative_to(ROOT).as_posix() for p in (ROOT / "laplace_ws").rglob("*") if p.is_file()}
    wanted = {name for name in wanted if "__pycache__" not in name}
    with zipfile.ZipFile(wheel) as files:
        in_wheel = set(files.namelist())
    with tarfile.open(archive) as files:
        in_archive = {name.partition("/")[2] for name in files.getnames()}
    found += [f"{wheel.name} lacks {name}" for name in sorted(wanted - in_wheel)]
    found += [f"{archive.name} lacks {name}" for name in sorted((wanted | {"LICENSE"}) - in_archive)]
    if not any(name.endswith("licenses/LICENSE") for name in in_wheel):
        found.append(f"{wheel.name} lacks LICENSE")
    if found:
        sys.exit("\n".join(found))
    print(f"{wheel.name}: {len(in_wheel)} files; {archive.name}: {len(in_archive)} files")


if __name__ == "__main__":
    main(Path(sys.argv[1]))
