"""The networks of other libraries: that they are covered, and the study of what their posteriors cost, at small size."""

import importlib.util
import json
import sys
from pathlib import Path

import check_networks
import network_cell
import pytest
import torch
from network_cell import STRUCTURES, PeakMemory, TimedLoader, costs, in_own_process
from real_networks import REAL_NETWORKS, inputs_of, labels_of, make_network, outputs_of

from laplace_ws import Laplace
from laplace_ws.errors import NotEnoughMemoryError

SMALL = {"networks": "[mobilenet_v3_small]", "structures": "[last_layer]", "n_batches": 2, "n_repeats": 1}
FIGURES = {
    "training_seconds", "training_mib", "n_weights", "n_covered", "first_batch_seconds", "batch_seconds", "fit_mib",
    "decomposition_seconds", "first_prediction_seconds", "prediction_mib", "prediction_seconds", "file_mib", "difference",
}  # fmt: skip


def needs(name: str):
    if REAL_NETWORKS[name].missing:
        pytest.skip(REAL_NETWORKS[name].missing)


def run(monkeypatch, tmp_path, *more: str) -> list[dict]:
    options = [text for key, value in {**SMALL, "out": tmp_path}.items() for text in (f"--{key}", str(value))]
    monkeypatch.setattr(sys, "argv", ["check_networks.py", "--config", "configs/check_networks.yaml", *options, *more])
    check_networks.main()
    return json.loads((tmp_path / "check_networks.json").read_text())["rows"]["rows"]


@pytest.mark.many(14, always="mobilenet_v3_small")
@pytest.mark.parametrize("structure", STRUCTURES)
@pytest.mark.parametrize("name", REAL_NETWORKS)
def test_every_network_is_accepted(name, structure):
    needs(name)
    network, model = REAL_NETWORKS[name], make_network(name, 0)
    (batch,) = network.batches(1, 0)
    with torch.no_grad():
        assert outputs_of(model, batch).shape[:-1] == labels_of(batch).shape
    la = Laplace(model, "classification", **STRUCTURES[structure], **network.options)
    try:
        la.check(inputs_of(batch))
    except NotEnoughMemoryError as error:  # of factors with 18,432 inputs, before any other check
        pytest.skip(str(error))


@pytest.mark.parametrize("name", ["mobilenet_v3_small", "timm_vit", "gpt2", "llama_lora"])
def test_one_of_each_library_is_fitted_and_found_again_in_its_file(name):
    needs(name)
    structure = "last_layer" if name in ("mobilenet_v3_small", "timm_vit") else "kron"
    found = {k: v for part in costs(name, structure, n_batches=2, n_repeats=1, seed=0) for k, v in part.items()}
    assert set(found) == FIGURES
    assert found["difference"] < 1e-6
    assert (found["n_covered"] < found["n_weights"]) == (structure == "last_layer")
    assert all(found[key] > 0 for key in FIGURES if key.endswith("seconds"))


def test_a_file_that_predicts_otherwise_is_an_error(monkeypatch):
    load = network_cell.load_posterior

    def other(path, model):
        la = load(path, model)
        la.prior_precision = 1e-3
        return la

    monkeypatch.setattr(network_cell, "load_posterior", other)
    with pytest.raises(RuntimeError, match="the posterior from the file predicts otherwise, by up to"):
        list(costs("mobilenet_v3_small", "last_layer", n_batches=2, n_repeats=1, seed=0))


@pytest.mark.skipif(sys.platform != "linux", reason="the peak is begun anew on Linux only")
def test_memory_is_the_peak_since_a_moment():
    before, n = PeakMemory(), 100 * 2**20
    kept = b"1" * n
    first = PeakMemory()
    passing = b"2" * n
    del passing
    assert first.mib == pytest.approx(100, abs=10)
    assert first.since(before) == pytest.approx(200, abs=20)
    assert PeakMemory().mib < 10
    del kept


def test_batches_are_timed_in_the_first_pass():
    loader = TimedLoader([(torch.ones(1), torch.ones(1))] * 3)
    for _ in range(2):
        assert len(list(loader)) == 3
    assert len(loader.seconds) == 3
    assert min(loader.seconds) >= 0


def test_a_process_that_takes_too_long_or_dies_is_an_error():
    item = {"network": "no such network", "structure": "kron", "n_batches": 1, "n_repeats": 1, "seed": 0}
    options = {"threads": 1, "memory_gb": None}
    assert in_own_process(item, **options, timeout_s=0.01) == item | {"error": "it takes longer than 0 s"}
    assert in_own_process(item, **options, timeout_s=120)["error"] == "KeyError: 'no such network'"


@pytest.mark.long
def test_each_cell_is_measured_in_a_process_of_its_own(tmp_path, monkeypatch, capsys):
    (row,) = run(monkeypatch, tmp_path)
    assert set(row) >= FIGURES
    assert row["error"] is None
    printed = capsys.readouterr().out
    assert "| mobilenet_v3_small | last_layer |" in printed
    assert printed.count("same from the file") == 1
    assert (tmp_path / "check_networks.md").read_text() in printed


def test_cells_that_have_records_are_not_repeated(tmp_path, monkeypatch, capsys):
    measured, fails = [], True

    def fake(item, **options):
        measured.append((item["network"], item["structure"]))
        figures = dict.fromkeys(FIGURES, 2.0) | {"training_seconds": 0.5, "n_weights": 7}
        if fails and item["structure"] == "kron":
            return item | {"training_seconds": 0.5, "error": "MemoryError: too much"}
        return item | figures

    monkeypatch.setattr(check_networks, "in_own_process", fake)
    options = ("--structures", "[kron, last_layer]")
    kron, last = run(monkeypatch, tmp_path, *options)
    assert (kron["error"], last["error"]) == ("MemoryError: too much", None)
    assert sorted(measured) == [("mobilenet_v3_small", "kron"), ("mobilenet_v3_small", "last_layer")]
    printed = capsys.readouterr().out
    assert (
        "| mobilenet_v3_small | last_layer | 4.0 | 4.0 | 4.0 | 4.0 | 4.0 | 2.0 | 2.0 | 2.0 | same from the file |"
        in printed
    )
    assert "| mobilenet_v3_small | kron | – | – | – | – | – | – | – | – | MemoryError: too much |" in printed

    jsonl = tmp_path / "check_networks.jsonl"
    jsonl.write_text(jsonl.read_text() + '{"network": "mob')
    fails = False
    run(monkeypatch, tmp_path, *options)
    assert len(measured) == 2
    kron, _ = run(monkeypatch, tmp_path, *options, "--retry_failed", "true")
    assert (kron["error"], len(measured)) == (None, 3)
    run(monkeypatch, tmp_path, *options, "--n_batches", "4", "--report_only", "true")
    assert len(measured) == 3
    run(monkeypatch, tmp_path, *options, "--n_batches", "4")
    assert len(measured) == 5


def test_a_network_whose_package_is_missing_is_said_so(tmp_path, monkeypatch):
    found = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None if name in ("peft", "timm") else found(name))
    monkeypatch.setattr(check_networks, "in_own_process", None)
    (row,) = run(monkeypatch, tmp_path, "--networks", "[timm_vit]")
    assert row["error"] == "not installed: pip install timm"
    assert not Path(tmp_path / "check_networks.jsonl").exists()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--networks", "[resnet81]"], "unknown network 'resnet81'; did you mean 'resnet18'?"),
        (["--networks", "[squeezenet1_0]"], "unknown network 'squeezenet1_0'"),
        (["--coverage", "true", "--networks", "[bert]"], "unknown network 'bert'"),
        (["--structures", "[full]"], "unknown structure 'full'"),
        (["--structures", "[]"], "structures is empty; name one at least, of kron, diag, last_layer"),
        (["--n_batches", "0"], "n_batches=0 must be at least 1"),
        (["--processes", "0"], "processes=0 must be at least 1"),
        (["--memory_gb", "0"], "memory_gb=0.0 must be positive"),
        (["--timeout_s", "-1"], "timeout_s=-1.0 must be positive"),
    ],
)
def test_what_cannot_be_measured_is_refused_in_one_line(arguments, message, tmp_path, monkeypatch):
    with pytest.raises(SystemExit) as ended:
        run(monkeypatch, tmp_path, *arguments)
    assert str(ended.value).startswith(f"error: {message}")
    assert list(tmp_path.iterdir()) == []


def test_the_survey_has_a_model_that_is_covered_and_one_that_is_not(monkeypatch, capsys):
    monkeypatch.setattr(
        sys, "argv", ["check_networks.py", "--coverage", "true", "--networks", "[squeezenet1_0, swin_v2_t]"]
    )
    monkeypatch.setattr(check_networks, "FACTOR_BACKENDS", ["native"])
    check_networks.main()
    *_, covered, refused = capsys.readouterr().out.splitlines()
    assert covered == "| squeezenet1_0 | yes |"
    assert "'features.5.0.attn.cpb_mlp.2.weight' has no Kronecker factors, as it does not enter add as it is" in refused
