"""Runs that are killed, interrupted or asked to end at any moment go on to the very numbers of one that was left alone."""

from __future__ import annotations

import json
import random
import shutil
import signal
import subprocess
import sys
import time
from collections import Counter
from dataclasses import replace
from functools import partial
from pathlib import Path

import pytest
import yaml
from hard.runs import results, run_config, start, uninterrupted

from laplace_ws.cli import main
from laplace_ws.data import TensorLoader
from laplace_ws.experiment import training
from laplace_ws.experiment.run import run_experiment
from laplace_ws.marglik.checkpoint import load_checkpoint

pytestmark = pytest.mark.skipif(not Path("/proc/self/stat").exists(), reason="looks at processes as Linux shows them")


@pytest.mark.parametrize("workers", [1, 2])
def test_killed_at_random_moments(workers, attacks, tmp_path):
    config, chance = run_config(tmp_path / "out", workers), random.Random(workers)
    expected = uninterrupted(tmp_path / "whole", config)
    n_kills = n_finished = 0
    longest = 0.5  # seconds; grows as long as runs are killed before they have come anywhere
    while n_kills < attacks(100):
        process = start(config)
        process.join(chance.uniform(0, longest))
        if process.is_alive():
            process.kill()
            process.join()
            n_kills += 1
            longest = min(longest * 1.2, 10.0)
        else:
            assert process.exitcode == 0
            assert results(config.folder) == expected
            shutil.rmtree(config.folder)
            n_finished += 1
            longest *= 0.5
    process = start(config)
    process.join()
    assert process.exitcode == 0
    assert results(config.folder) == expected
    print(f"{workers} workers: {n_kills} kills, {n_finished + 1} runs finished")


def test_two_writers(attacks, tmp_path):
    """Two processes that begin at once: one of them trains, the other says why it does not."""
    config = run_config(tmp_path / "out", n_epochs=4)
    expected = uninterrupted(tmp_path / "whole", config)
    for _ in range(attacks(20)):
        processes = [start(config), start(config)]
        for process in processes:
            process.join()
        # the second is refused, or comes when the first has finished and finds a finished run
        assert sorted(process.exitcode for process in processes) in ([0, 1], [0, 0])
        assert results(config.folder) == expected
        shutil.rmtree(config.folder)


def not_ignored() -> None:
    """Take signals whoever started the tests: a shell has its background jobs ignore SIGINT, and nohup SIGHUP."""
    for number in (signal.SIGINT, signal.SIGHUP):
        signal.signal(number, signal.SIG_DFL)


def begun(tmp_path: Path, *, workers: int) -> subprocess.Popen[str]:
    """`laplace-ws train` in a process of its own, with two networks under way where there are two workers."""
    config = run_config(tmp_path / "out", workers, n_epochs=100_000)
    m = replace(config.marglik, marglik_frequency=1000, n_epochs_burnin=1000)
    settings = {
        "name": "run", "out": config.out, "workers": workers, "report": False,
        "data": vars(config.data), "model": {"name": "mlp", "hidden": [5]},
        "marglik": {"n_epochs": m.n_epochs, "n_epochs_burnin": m.n_epochs_burnin, "marglik_frequency": m.marglik_frequency,
                    "fit_fraction": m.fit_fraction},
        "baselines": {"fixed_prior_precisions": [0.5, 100.0]},
    }  # fmt: skip
    path = tmp_path / "run.yaml"
    path.write_text(yaml.safe_dump(settings))
    process = subprocess.Popen(
        [sys.executable, "-m", "laplace_ws", "train", "--config", str(path)],
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
        preexec_fn=not_ignored,
    )
    metrics = config.folder / "metrics.jsonl"
    wait_until(lambda: metrics.exists() and sum(n > 3 for n in epochs_in(metrics).values()) == workers)
    return process


def epochs_in(metrics: Path) -> Counter[str]:
    """How many epochs of each network have been written."""
    return Counter(json.loads(line)["run"] for line in metrics.read_text().splitlines() if line.endswith("}"))


def lines(path: Path) -> int:
    return path.read_text().count("\n")


def maps_a_library(pid: int) -> bool:
    return "site-packages" in Path(f"/proc/{pid}/maps").read_text()


def wait_until(happens, seconds: float = 120) -> None:
    deadline = time.monotonic() + seconds
    while not happens():
        assert time.monotonic() < deadline
        time.sleep(0.05)


def processes_of(session: int) -> set[int]:
    """The processes of a session that run."""
    found = set()
    for path in Path("/proc").glob("[0-9]*/stat"):
        try:
            fields = path.read_text().rpartition(")")[2].split()
        except (FileNotFoundError, ProcessLookupError):
            continue
        if int(fields[3]) == session and fields[0] != "Z":
            found.add(int(path.parent.name))
    return found


@pytest.mark.parametrize(("number", "workers"), [(signal.SIGTERM, 2), (signal.SIGHUP, 1), (signal.SIGINT, 2)])
def test_a_signal_to_the_parent_keeps_the_last_epoch_and_says_how_to_go_on(number, workers, hard, tmp_path):
    if number == signal.SIGINT and not hard:
        pytest.skip("with --hard; tests/test_cli.py sends it to the whole group of processes")
    process = begun(tmp_path, workers=workers)
    process.send_signal(number)
    _, said = process.communicate(timeout=60)
    assert process.returncode == 128 + number
    assert ("interrupted" if number == signal.SIGINT else "asked to end") in said
    assert f"python -m laplace_ws train --config {tmp_path / 'run.yaml'} --resume" in said
    assert "Traceback" not in said
    wait_until(lambda: not processes_of(process.pid), 10)
    folder = tmp_path / "out" / "run"
    for path in folder.glob("checkpoint*.pt"):
        name = "tuned" if path.name == "checkpoint.pt" else path.stem.removeprefix("checkpoint-")
        logged = epochs_in(folder / "metrics.jsonl")[name]
        assert load_checkpoint(path)["progress"]["epoch"] >= logged - 1 > 0  # tunings come after 1,000 epochs only
    assert len(list(folder.glob("checkpoint*.pt"))) == workers


def test_workers_end_with_a_parent_that_is_killed(tmp_path):
    process = begun(tmp_path, workers=2)
    assert len(processes_of(process.pid)) >= 3
    process.kill()
    process.wait()
    wait_until(lambda: not processes_of(process.pid), 10)
    metrics = tmp_path / "out" / "run" / "metrics.jsonl"
    n_lines = lines(metrics)
    time.sleep(1)
    assert lines(metrics) == n_lines


def test_an_interrupt_during_imports_is_one_line(attacks, tmp_path):
    chance = random.Random(0)
    for _ in range(attacks(50)):
        process = subprocess.Popen(
            [sys.executable, "-m", "laplace_ws", "train", "--config", "demo", "--out", str(tmp_path)],
            stderr=subprocess.PIPE,
            text=True,
            preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
        )
        # Python itself starts up before that; libraries are mapped once imports are under way
        wait_until(partial(maps_a_library, process.pid))
        time.sleep(chance.uniform(0, 0.5))
        process.send_signal(signal.SIGINT)
        _, said = process.communicate(timeout=60)
        assert process.returncode == 130
        assert "Traceback" not in said
        assert "laplace-ws: interrupted; " in said


class Glitch(TensorLoader):
    """Images of one pass are wrong, and make the loss overflow."""

    n_passes = 0

    def __iter__(self):
        Glitch.n_passes += 1
        for x, y in super().__iter__():
            yield (x * 1e30 if Glitch.n_passes == 9 else x), y


def test_a_run_that_diverged_goes_on_at_a_lower_learning_rate(tmp_path, capsys, monkeypatch):
    path = tmp_path / "run.yaml"
    settings = {
        "name": "run", "out": str(tmp_path), "report": True, "data": {"n_train": 60, "n_test": 40, "batch_size": 20},
        "model": {"name": "mlp", "hidden": [5]},
        "marglik": {"n_epochs": 12, "n_epochs_burnin": 2, "marglik_frequency": 2, "fit_fraction": 1.0, "n_hypersteps": 3,
                    "lr": 0.01, "prior_prec_init": 0.5},
    }  # fmt: skip
    path.write_text(yaml.safe_dump(settings))
    with monkeypatch.context() as context:
        context.setattr(training, "TensorLoader", Glitch)
        assert main(["train", "--config", str(path)]) == 1
    said = capsys.readouterr().err
    assert f"go on from '{tmp_path / 'run' / 'checkpoint.pt'}' at a lower learning rate" in said
    kept = load_checkpoint(tmp_path / "run" / "checkpoint.pt")
    assert kept["diverged"]
    arguments = ["train", "--config", str(path), "--resume", "--marglik.lr", "0.001"]
    assert main([*arguments, "--data.batch_size", "10"]) == 2
    assert "data.batch_size was 20 and is 10" in capsys.readouterr().err
    assert main(arguments) == 0
    summary = json.loads((tmp_path / "run" / "summary.json").read_text())
    epoch = kept["progress"]["epoch"]
    assert 0 < epoch < 11
    assert summary["tuned"]["changes"] == [
        {"epoch": epoch, "setting": "optimizer_kwargs.lr", "was": 0.01, "now": 0.001}
    ]
    logged = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    assert [line["epoch"] for line in logged] == list(range(1, 13))
    assert all((line["lr"] > 0.001) == (line["epoch"] <= epoch) for line in logged)
    assert "was changed from 0.01 to 0.001" in (tmp_path / "run" / "report.html").read_text()


def test_a_run_that_did_not_diverge_keeps_its_learning_rate(tmp_path):
    config = run_config(tmp_path, n_epochs=3)
    run_experiment(config)
    (config.folder / "summary.json").unlink()
    with pytest.raises(ValueError, match=r"marglik\.lr was 0\.03 and is 0\.01"):
        run_experiment(replace(config, marglik=replace(config.marglik, lr=0.01)), resume=True)
    assert (config.folder / "checkpoint.pt").exists()
