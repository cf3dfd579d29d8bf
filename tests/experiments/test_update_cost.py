"""The cost of a tuning by batch size, at small size."""

import json
import sys

import pytest
import update_cost

SMALL = {
    "networks": "[{depth: 10, width: 1}]", "batch_sizes": "[4]", "contestants": "[ours, asdl]", "kfac_approxes": "[reduce]",
    "curvatures": "[ef]", "n_hypersteps": 2, "n_repeats": 2, "n_classes": 3, "image_size": 8, "memory_gb": 8,
}  # fmt: skip


def run(monkeypatch, tmp_path, *more: str) -> None:
    options = [text for key, value in {**SMALL, "out": tmp_path}.items() for text in (f"--{key}", str(value))]
    monkeypatch.setattr(sys, "argv", ["update_cost.py", "--config", "configs/update_cost.yaml", *options, *more])
    update_cost.main()


@pytest.mark.long
def test_each_case_is_measured_once_and_reported(tmp_path, monkeypatch, capsys):
    run(monkeypatch, tmp_path)
    result = json.loads((tmp_path / "update_cost.json").read_text())["rows"]
    ours, asdl = result["rows"]
    assert set(result["machine"]) >= {"cpu", "threads", "torch"}
    assert asdl["error"] == "not offered: ASDL has K-FAC-expand alone"
    seconds = {name: summary["median"] for name, summary in ours["seconds"].items()}
    assert set(seconds) == {"fit", "decomposition", "hyper-steps", "fit and decomposition", "update"}
    assert ours["decomposition_share"] == pytest.approx(seconds["decomposition"] / seconds["update"])
    assert ours["peak_bytes"] > ours["training_peak_bytes"] / 100
    lines = (tmp_path / "update_cost.jsonl").read_text().splitlines(keepends=True)
    assert [json.loads(line)["kind"] for line in lines] == ["tuning", "tuning_memory", "tuning"]
    assert (tmp_path / "update_cost.svg").read_bytes().startswith(b"<svg")

    monkeypatch.setattr(update_cost, "answers", None)  # nothing is measured again
    (tmp_path / "update_cost.jsonl").write_text("".join(lines) + '{"kind": "tun')
    run(monkeypatch, tmp_path)
    assert (tmp_path / "update_cost.jsonl").read_text() == "".join(lines)
    run(monkeypatch, tmp_path, "--report_only", "true", "--batch_sizes", "[4, 8]")
    printed = capsys.readouterr().out
    assert printed.count("| WRN-10-1 | 4 | reduce | ef | asdl | not offered: ASDL has K-FAC-expand alone |") == 3


def measured(n: int, times: list[float], decomposition: list[float]) -> dict:
    return {"seconds": {"fit": times, "decomposition": decomposition}, "training_seconds": [1.0] * n}


def test_figures_are_of_whole_rounds():
    times = measured(3, [1.0, 2.0, 6.0], [3.0, 1.0, 1.0])
    row = update_cost.figures(times, {"error": "does not fit: 1 GB"})
    assert row["seconds"]["update"]["median"] == 4.0  # of 4, 3 and 7
    times["seconds"]["hyper-steps"] = [1.0, 1.0, 1.0]
    seconds = update_cost.figures(times, {})["seconds"]
    assert (seconds["update"]["median"], seconds["fit and decomposition"]["median"]) == (5.0, 4.0)
    assert row["in_training_steps"]["median"] == 4.0
    assert row["decomposition_share"] == 0.25
    assert row["memory_error"] == "does not fit: 1 GB"


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--contestants", "[curvlinop]"], "unknown contestant 'curvlinop'; did you mean 'curvlinops'?"),
        (["--memory_gb", "0"], "memory_gb=0.0 must be positive"),
        (["--batch_sizes", "[0]"], "batch_sizes must be at least 1: [0]"),
        (["--n_repeats", "0"], "n_repeats=0 must be at least 1"),
        (["--curvatures", "[fisher]"], "unknown curvature 'fisher'"),
        (["--networks", "[]"], "networks is empty; name one at least, such as {depth: 10, width: 2}"),
        (["--networks", "[{depth: 11, width: 1}]"], "depth=11 must be 6n + 4"),
    ],
)
def test_what_cannot_be_measured_is_refused_in_one_line(arguments, message, tmp_path, monkeypatch):
    with pytest.raises(SystemExit) as ended:
        run(monkeypatch, tmp_path, *arguments)
    assert str(ended.value).startswith(f"error: {message}")
    assert list(tmp_path.iterdir()) == []
