"""The arithmetic of the benchmark: medians, quartiles, ratios, lines, rows, tables; no process is started."""

import json
from dataclasses import asdict

import pytest
from bench_curvature.config import BenchConfig
from bench_curvature.files import load_result
from bench_curvature.meter import peak_of_changes
from bench_curvature.rows import case_rows, curve_rows, update_rows
from bench_curvature.summary import Summary, ratios, straight_line, summarise
from bench_curvature.tables import NOTHING, as_markdown, spread, table, write_between_markers

TIMES = {"kind": "times", "contestant": "curvlinops", "kfac_approx": "expand", "curvature": "ef"}
ONE = BenchConfig(contestants=["curvlinops"], kfac_approxes=["expand"], curvatures=["ef"])


def test_median_and_quartiles():
    assert summarise([4.0, 1.0, 3.0, 2.0, 5.0]) == Summary(3.0, 2.0, 4.0, 5)
    assert summarise([2.0, 1.0]) == Summary(1.5, 1.25, 1.75, 2)
    assert summarise([7.0]) == Summary(7.0, 7.0, 7.0, 1)


def test_ratios_are_of_neighbours():
    assert ratios([2.0, 9.0], [1.0, 3.0]) == [2.0, 3.0]
    with pytest.raises(ValueError, match="argument 2 is longer"):
        ratios([1.0], [1.0, 2.0])


def test_straight_line():
    line = straight_line([1, 2, 4], [5.0, 7.0, 11.0])
    assert line is not None
    assert (line.slope, line.intercept, line.r_squared) == pytest.approx((2.0, 3.0, 1.0))
    bent = straight_line([1, 2, 3], [1.0, 4.0, 1.0])
    assert bent is not None
    assert bent.r_squared == pytest.approx(0.0)
    assert straight_line([1, 2, 2], [1.0, 2.0, 2.0]) is None  # any line would fit


def test_peak_is_the_highest_level_above_the_start():
    assert peak_of_changes([3, 4, -5, 2]) == 7
    assert peak_of_changes([-5, 4]) == 0
    assert peak_of_changes([]) == 0


def test_a_row_gathers_all_rounds():
    rounds = [
        {**TIMES, "round": 0, "training_seconds": [1.0, 2.0], "seconds": [2.0, 6.0], "first_seconds": 3.0},
        {**TIMES, "round": 1, "training_seconds": [1.0, 1.0], "seconds": [4.0, 5.0], "first_seconds": 6.0},
    ]
    memory = {**TIMES, "kind": "memory", "training_peak_bytes": 10, "peak_bytes": 15, "first_peak_bytes": 30}
    (row,) = case_rows(ONE, [*rounds, memory])
    assert row["in_training_steps"] == {"median": 3.5, "q1": 2.75, "q3": 4.25, "n": 4}
    assert row["first_batch_in_training_steps"]["median"] == pytest.approx((3.0 / 1.5 + 6.0) / 2)
    assert (row["peak_in_training_steps"], row["first_batch_peak_in_training_steps"]) == (1.5, 3.0)
    assert row["error"] is None


def test_an_error_in_any_round_is_the_rows():
    good = {**TIMES, "round": 0, "training_seconds": [1.0], "seconds": [2.0], "first_seconds": 3.0}
    (row,) = case_rows(ONE, [good, {**TIMES, "round": 1, "error": "ValueError: no"}])
    assert row["error"] == "ValueError: no"
    assert "in_training_steps" not in row


def result(measured) -> dict:
    machine = {"cpu": "a processor", "gpu": None, "threads": 1, "torch": "2", "libraries": {"curvlinops": None}}
    return {
        "name": "one",
        "format_version": 1,
        "config": asdict(ONE),
        "machine": machine,
        "contestants": {"curvlinops": "factors"},
        "cases": case_rows(ONE, measured),
        "curves": curve_rows(measured),
        "updates": update_rows(measured),
    }


def test_tables_show_figures_errors_and_what_is_unmeasured():
    points = [{"value": v, "seconds": [0.001 * v]} for v in (2, 4, 8)]
    curve = {"kind": "curve", "axis": "batch_size", "kfac_approx": "expand", "points": points}
    update = {"kind": "update", "precision": "bf16", "batch_size": 128, "kfac_approx": "expand"}
    good = {**TIMES, "training_seconds": [0.5], "seconds": [1.0], "first_seconds": 2.0}
    text = as_markdown(result([good, curve, {**update, "error": "unmeasured (no GPU)"}]))
    assert "| curvlinops | 2.00 |" in text
    assert "| expand | ef | curvlinops | 2.00 (2.00–2.00) | 1000 (1000–1000) | 4.00 | – | – |" in text
    assert f"curvlinops {NOTHING}" in text  # a version that is not known
    assert "| expand | 2 | 4 | 8 |" in text
    assert "+1·n | 1.0000 |" in text
    assert "| bf16 | 128 | expand | unmeasured (no GPU) | – |" in text
    text = as_markdown(result([{**TIMES, "error": "ValueError: a | b"}]))
    assert "| expand | ef | curvlinops | ValueError: a \\| b | – | – | – | – |" in text
    assert "| curvlinops | – |" in text


def test_numbers_have_as_many_digits_as_they_mean():
    assert spread({"median": 1.234, "q1": 1.2, "q3": 123.4}) == "1.23 (1.20–123)"
    assert table(["a"], [["b"]]) == "| a |\n| --- |\n| b |"


def test_only_the_section_between_markers_is_written(tmp_path):
    path = tmp_path / "doc.md"
    two = "\n".join(f"<!-- bench curvature: {n} -->\nold\n<!-- end of bench curvature: {n} -->" for n in ("one", "two"))
    path.write_text(f"before\n{two}\nafter\n")
    write_between_markers(path, "one", r"new \1")
    write_between_markers(path, "one", r"newer \1")
    text = path.read_text()
    assert text.startswith("before\n<!-- bench curvature: one -->\n\nnewer \\1\n\n<!-- end")
    assert text.endswith("two -->\nafter\n")
    assert text.count("old") == 1
    with pytest.raises(ValueError, match="no place for the tables: add the lines '<!-- bench curvature: three -->'"):
        write_between_markers(path, "three", "")


@pytest.mark.parametrize("text", ["{", "[]", '{"format_version": 0}'])
def test_files_that_are_no_results_are_refused(tmp_path, text):
    path = tmp_path / "a.json"
    path.write_text(text)
    with pytest.raises(ValueError, match=r"is not valid JSON|holds no result"):
        load_result(path)
    path.write_text(json.dumps(result([{**TIMES, "error": "no"}])))
    assert load_result(path)["name"] == "one"
