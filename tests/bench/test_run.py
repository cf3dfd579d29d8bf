"""Whole benchmarks at a tiny size, with processes of their own."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from bench_curvature import run
from bench_curvature.command import main, parse
from bench_curvature.config import BenchConfig, CurvesConfig, NetworkConfig, UpdatesConfig
from bench_curvature.run import NO_GPU, run_bench

TINY = [
    "--n_rounds=1", "--n_repeats=1", "--network.depth=10", "--network.width=1", "--network.n_classes=3",
    "--network.image_size=8", "--network.n_images=4", "--curves.batch_sizes=[2, 3, 4]", "--curves.n_classes=[]",
    "--updates.batch_sizes=[4]", "--kfac_approxes=[expand]", "--contestants=[ours-native, curvlinops]",
]  # fmt: skip
ROOT = Path(__file__).parents[2]
NOTHING_MORE = {"memory": False, "curves": CurvesConfig(batch_sizes=[], n_classes=[])}


@pytest.mark.long
def test_a_benchmark_from_end_to_end(tmp_path, capsys):
    pytest.importorskip("curvlinops")
    docs = tmp_path / "doc.md"
    docs.write_text("<!-- bench curvature: tiny --><!-- end of bench curvature: tiny -->")
    options = [*TINY, "--name=tiny", f"--out={tmp_path}", f"--docs={docs}", "--curvatures=[ef]"]
    assert main(options) == 0
    result = json.loads((tmp_path / "tiny.json").read_text())
    assert set(result) == {
        "name", "format_version", "config", "machine", "contestants", "cases", "curves", "updates", "measurements"
    }  # fmt: skip
    assert set(result["machine"]) >= {"cpu", "gpu", "threads", "python", "torch", "laplace_ws", "libraries"}
    assert set(result["machine"]["libraries"]) == {"curvlinops-for-pytorch"}
    assert [(row["contestant"], row["error"]) for row in result["cases"]] == [
        ("ours-native", None),
        ("curvlinops", None),
    ]
    for row in result["cases"]:
        for key in ("in_training_steps", "seconds", "training_step_seconds", "first_batch_in_training_steps"):
            assert set(row[key]) == {"median", "q1", "q3", "n"}
            assert row[key]["median"] > 0
        assert 0 < row["peak_bytes"] < row["first_batch_peak_bytes"]
    (curve,) = result["curves"]
    assert [point["value"] for point in curve["points"]] == [2, 3, 4]
    assert set(curve["line"]) == {"slope", "intercept", "r_squared"}
    (update,) = result["updates"]
    assert (update["error"] is None) == torch.cuda.is_available()
    printed = capsys.readouterr().out
    assert "| expand | ef | curvlinops |" in printed
    assert "| expand | ef | curvlinops |" in docs.read_text()
    measured = (tmp_path / "tiny.json").read_bytes()
    assert main(options) == 2
    assert "holds measurements already, 'tiny.json'" in capsys.readouterr().err
    assert main([*options, "--name=../tiny"]) == 2
    assert (tmp_path / "tiny.json").read_bytes() == measured
    written = {"tiny.json", "tiny.md", "tiny.svg", "tiny_curves.svg", "doc.md"}
    assert {path.name for path in tmp_path.iterdir()} == written

    for name in written - {"tiny.json"}:
        before = (tmp_path / name).read_bytes()
        if name != "doc.md":
            (tmp_path / name).unlink()
        assert main(["render", str(tmp_path / "tiny.json"), f"--docs={docs}"]) == 0
        assert (tmp_path / name).read_bytes() == before


@pytest.mark.skipif(torch.cuda.is_available(), reason="needs a machine without a GPU")
def test_without_a_gpu_nothing_is_invented():
    network = NetworkConfig(10, 1, "none", 3, 8, 4)
    config = BenchConfig(device="cuda", network=network, updates=UpdatesConfig(batch_sizes=[128, 256]))
    result = run_bench(config)
    rows = result["cases"] + result["curves"] + result["updates"]
    assert {row["error"] for row in rows} == {NO_GPU}
    assert len(result["cases"]) == 6 * len(config.contestants)
    assert [row["batch_size"] for row in result["updates"]] == [128, 128, 256, 256]


def test_a_process_that_dies_is_a_line(monkeypatch):
    monkeypatch.setattr(run, "_WORKER", [sys.executable, "-c", "import sys; sys.exit('out of memory')"])
    config = BenchConfig(contestants=["asdl"], n_rounds=2, updates=UpdatesConfig(batch_sizes=[]), **NOTHING_MORE)
    result = run_bench(config)
    assert {row["error"] for row in result["cases"]} == {"its process ended with status 1: out of memory"}
    assert len(result["measurements"]) == 6  # not tried again


def test_an_interrupt_leaves_nothing_behind(tmp_path):
    options = [*TINY, "--n_repeats=100000", f"--out={tmp_path / 'out'}"]
    scratch = tmp_path / "scratch"
    scratch.mkdir()
    process = subprocess.Popen(
        [sys.executable, str(ROOT / "experiments" / "bench_curvature.py"), *options],
        stderr=subprocess.PIPE,
        text=True,
        env=os.environ | {"TMPDIR": str(scratch)},
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),  # a shell has its background jobs ignore it
    )
    deadline = time.monotonic() + 60
    while time.monotonic() < deadline and not workers_of(process.pid):
        time.sleep(0.1)
    (worker,) = workers_of(process.pid)
    process.send_signal(signal.SIGINT)  # the parent alone, as the harder case
    _, err = process.communicate(timeout=120)  # a busy machine takes its time
    assert process.returncode == 130
    assert "interrupted; nothing was written" in err
    assert "Traceback" not in err
    deadline = time.monotonic() + 10
    while time.monotonic() < deadline and is_running(worker):
        time.sleep(0.1)
    assert not is_running(worker)
    assert list(scratch.iterdir()) == list((tmp_path / "out").iterdir()) == []


def is_running(pid: int) -> bool:
    """Whether a process is there and no zombie, which an orphan is until the system collects it."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except FileNotFoundError:
        return False


def workers_of(pid: int) -> list[int]:
    """The children that measure; imports start others for a moment, as `ldconfig`."""
    path = Path(f"/proc/{pid}/task/{pid}/children")
    if not path.exists():
        pytest.skip("needs Linux's list of children")
    return [int(child) for child in path.read_text().split() if "bench_curvature.worker" in command_line(int(child))]


def command_line(pid: int) -> str:
    try:
        return Path(f"/proc/{pid}/cmdline").read_text()
    except (FileNotFoundError, ProcessLookupError):
        return ""


@pytest.mark.parametrize("name", ["bench_curvature", "bench_curvature_cuda", "bench_curvature_tiny"])
def test_files_are_valid(name):
    config = parse([f"--config={ROOT / 'configs' / f'{name}.yaml'}"])
    assert config.name == name
    run.check_config(config)


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (["--n_round", "3"], "unknown key 'n_round'; did you mean 'n_rounds'?"),
        (["--network.dept", "3"], "unknown key 'network.dept'"),
        (["--resume"], "unknown key 'resume'"),
        (["--n_rounds", "many"], "n_rounds"),
        (["--contestants", "[curvlinop]"], "unknown contestant 'curvlinop'; did you mean 'curvlinops'?"),
        (["--docs", "nowhere.md"], "'nowhere.md' cannot be read"),
        (["--out", "/proc/nowhere"], "cannot be written"),
    ],
)
def test_bad_arguments_are_refused_in_one_line(arguments, says, monkeypatch, tmp_path, capsys):
    monkeypatch.chdir(tmp_path)
    assert main(arguments) == 2
    err = capsys.readouterr().err
    assert says in err
    assert err.count("\n") == 1


def test_help_and_commands(tmp_path, capsys):
    assert main(["--help"]) == 0
    assert "bench_curvature.py render --help" in " ".join(capsys.readouterr().out.split())
    assert main(["render", "--help"]) == 0
    assert "JSON file of a benchmark" in capsys.readouterr().out
    assert main(["rendr"]) == 2
    assert "rendr" in capsys.readouterr().err
    assert main(["render"]) == 2
    assert "result" in capsys.readouterr().err
    assert main(["render", str(tmp_path / "nowhere.json")]) == 2
    assert "nowhere.json" in capsys.readouterr().err
