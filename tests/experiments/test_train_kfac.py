"""The study of K-FAC as an optimiser, at small size."""

import copy
import json
import sys

import pytest
import torch
from torch import nn
from train_kfac import command, optimizers
from train_kfac.config import Contestant, DataConfig, TrainKfacConfig
from train_kfac.molecules import N_ATOM_FEATURES, N_BOND_FEATURES, Molecules, Substance, molecules_of, structures_of
from train_kfac.nets import GraphNetwork, VisionTransformer
from train_kfac.summary import Row, reached
from train_kfac.training import Job, _batches, _rate

from laplace_ws import kron_factors
from laplace_ws.optim import KFAC


def some_molecules(n=40):
    """Rings of atoms, whose melting point grows with their number."""
    sizes = torch.arange(n) % 4 + 3
    ends = torch.cat(
        [torch.stack([torch.arange(s).repeat(2), (torch.arange(s) + 1).remainder(s).repeat(2)]) for s in sizes], 1
    )
    return Molecules(
        torch.rand(int(sizes.sum()), N_ATOM_FEATURES),
        torch.rand(2 * int(sizes.sum()), N_BOND_FEATURES),
        ends,
        sizes,
        2 * sizes,
        300.0 + 10 * sizes + torch.rand(n),
    )


@pytest.fixture
def cache(tmp_path):
    some_molecules().save(tmp_path / "molecules.pt")
    return tmp_path


@pytest.fixture
def yaml(cache):
    path = cache / "tiny.yaml"
    path.write_text(f"""
data: {{task: molecules, cache: {cache}, n_validation: 6}}
model: {{width: 8, n_blocks: 1}}
horizon: 8
batch_size: 8
seeds: [0, 1]
out: {cache}/out
contestants:
  nadamw: {{optimizer: nadamw, role: reference, trials: [{{lr: 0.001}}, {{lr: 0.01}}]}}
  sgd: {{optimizer: sgd, role: reference, trials: [{{lr: 0.001}}, {{lr: 0.01}}]}}
  muon: {{optimizer: muon, role: rival, options: {{weight_decay: 0.05}}, trials: [{{lr: 0.001}}, {{lr: 0.01}}]}}
  expand: {{optimizer: kfac, role: kfac, trials: [{{lr: 0.01}}, {{lr: 0.1}}], tuned_at: 0.5, budgets: [0.5, 1.0]}}
""")
    return path


def start(monkeypatch, yaml, *options):
    monkeypatch.setattr(sys, "argv", ["train_kfac.py", "--config", str(yaml), *options])
    command.main("doc")


def test_two_processes_do_the_study_together_and_it_is_not_done_twice(yaml, monkeypatch, capsys):
    out = yaml.parent / "out" / "molecules"
    start(monkeypatch, yaml, "--report_only", "true")
    assert "no training to report yet" in capsys.readouterr().out
    start(monkeypatch, yaml, "--share", "0/2")
    assert "other processes have trials to run" in capsys.readouterr().out
    start(monkeypatch, yaml, "--share", "1/2")
    start(monkeypatch, yaml, "--share", "0/2")
    records = sorted((out / "records").iterdir())
    assert len(records) == 8 + 2 * (1 + 1 + 1 + 2)
    times = [record.stat().st_mtime_ns for record in records]
    monkeypatch.setattr(command, "run", lambda *args: pytest.fail("was there already"))
    start(monkeypatch, yaml)
    assert [record.stat().st_mtime_ns for record in sorted((out / "records").iterdir())] == times
    found = json.loads((out / "train_kfac.json").read_text())
    assert [(row["contestant"], row["n_steps"], len(row["scores"])) for row in found["rows"]] == [
        ("nadamw", 8, 2),
        ("sgd", 8, 2),
        ("muon", 8, 2),
        ("expand", 4, 2),
        ("expand", 8, 2),
    ]
    assert {r["target"][0] for r in found["reached"]} <= {"nadamw", "sgd", "muon"}
    assert (out / "train_kfac.svg").read_bytes().startswith(b"<svg")
    assert "| expand | 4 |" in (out / "train_kfac.md").read_text()


def test_images_are_read_from_folders(tmp_path, monkeypatch):
    from torchvision.utils import save_image
    from train_kfac.tasks import make_task

    for part, n in (("train", 6), ("test", 3)):
        for label in ("cat", "dog"):
            folder = tmp_path / part / label
            folder.mkdir(parents=True)
            for i in range(n):
                save_image(torch.rand(3, 16, 16), folder / f"{i}.png")
    config = DataConfig("images", root=str(tmp_path), cache=str(tmp_path / "cache"), n_validation=4)
    task = make_task(config)
    assert {part: len(chosen) for part, chosen in task.parts.items()} == {"train": 8, "validation": 4, "test": 6}
    x, y = task.batch(task.parts["test"], "cpu")
    assert (x.shape, y.tolist()) == ((6, 3, 16, 16), [0, 0, 0, 1, 1, 1])
    vit = {"patch": 8, "width": 8, "depth": 1, "n_heads": 2}
    for options in (vit, {"network": "wide-resnet", "depth": 10, "width": 1, "norm": "batch"}):
        model = task.network(options)
        assert 0 <= task.score(model.eval(), "test", "cpu") <= 100
        for name in ("nadamw", "muon", "kfac"):
            before = [p.clone() for p in model.parameters()]
            for optimizer in optimizers.make_optimizers(name, model.train(), {"lr": 0.01, "weight_decay": 0.1}):
                optimizer.zero_grad()
                task.loss(model(x), y).backward()
                optimizer.step()
            changed = [not torch.equal(p, q) for p, q in zip(model.parameters(), before, strict=True)]
            assert sum(changed) >= 0.9 * len(changed)


def test_molecules_of_a_batch_are_those_that_were_chosen():
    molecules = some_molecules()
    net = GraphNetwork(8, 2)
    together = net(molecules.batch(torch.tensor([5, 0, 2])))
    for place, number in enumerate((5, 0, 2)):
        alone = net(molecules.batch(torch.tensor([number])))
        torch.testing.assert_close(together[place : place + 1], alone, rtol=1e-4, atol=1e-5)
    part = molecules.batch(torch.tensor([5, 0, 2]))[1:]
    torch.testing.assert_close(net(part), together[1:], rtol=1e-4, atol=1e-5)


def test_molecules_are_made_of_smiles_each_structure_once():
    pytest.importorskip("rdkit")
    rows = [("CCO", 159.0), ("OCC", 161.0), ("C", 90.7), ("no molecule", 1.0), ("c1ccccc1Br", 242.0)]
    found = molecules_of(structures_of(rows))
    assert (found.n_atoms.tolist(), found.n_bonds.tolist()) == ([3, 7], [4, 14])  # methane has no bond
    assert found.melting_point.tolist() == [160.0, 242.0]
    assert (found.atoms.shape[1], found.bonds.shape[1]) == (N_ATOM_FEATURES, N_BOND_FEATURES)
    assert found.ends[:, :4].T.tolist() == [[0, 1], [1, 0], [1, 2], [2, 1]]
    assert found.atoms[:3, :3].tolist() == [[1, 0, 0], [1, 0, 0], [0, 0, 1]]  # carbon, carbon, oxygen
    assert found.bonds[4:, 3].sum() == 12  # the aromatic ones of bromobenzene, in both directions


def test_the_datasheet_counts_what_each_filter_leaves(monkeypatch, capsys):
    pytest.importorskip("rdkit")
    import describe_molecules

    rings = [Substance("C1" + "C" * n + "1", 300.0 + n) for n in range(2, 42)]
    isomers = [Substance("C/C=C/C", 167.0), Substance("C/C=C\\C", 134.0), Substance("CO.O", 200.0)]
    monkeypatch.setattr(describe_molecules, "melting_point_rows", lambda: [*isomers, Substance(None, 1.0), *rings])
    monkeypatch.setattr(describe_molecules, "version", lambda package: "1")
    monkeypatch.setattr(describe_molecules, "DataConfig", lambda task: DataConfig(task, n_validation=5))
    describe_molecules.main()
    out = capsys.readouterr().out
    assert "| rows of the table | 44 |" in out
    assert "| with a structure (SMILES) in the same package | 43 |" in out
    assert "| different structures (canonical SMILES): what is used | 43 |" in out
    assert "| different graphs, which do not tell stereoisomers apart | 42 |" in out
    assert "| … median, largest difference of these | 33.0 K, 33.0 K |" in out
    assert "| structures of several parts (salts, solvates) | 1 |" in out
    assert "| training, validation, test | 33, 5, 5 |" in out


@pytest.mark.parametrize("approx", ["expand", "reduce"])
def test_all_weights_of_the_networks_are_preconditioned(approx):
    batch = some_molecules().batch(torch.arange(6))
    for net, x in ((GraphNetwork(8, 2), batch), (VisionTransformer(16, 8, 8, 1, 2), torch.randn(6, 3, 16, 16))):
        optimizer = KFAC(net, kfac_approx=approx, lr=0.0, loss_reduction="sum")
        (net(x).square().sum() / 2).backward()
        optimizer.step()
        weights = {name for name, p in net.named_parameters() if p.ndim > 1}
        assert set(optimizer.layers) == weights - {"position"}
        f = net(x).detach()
        frozen = copy.deepcopy(net)
        for name, p in frozen.named_parameters():
            p.requires_grad_(name in optimizer.layers)
        truth = kron_factors(frozen, "regression", [(x, torch.zeros_like(f))], curvature="ef", kfac_approx=approx)
        for name in optimizer.layers:
            torch.testing.assert_close(optimizer.kron(6)[name].B, truth[name].B, rtol=1e-3, atol=1e-5)


def test_each_budget_has_a_schedule_of_its_own():
    job = Job("a", "sgd", {}, 40, 0, "test", 4, 0.05, {}, {})
    rates = [_rate(step, job) for step in range(40)]
    assert rates[:2] == [0.5, 1.0]
    assert rates[1:] == sorted(rates[1:], reverse=True)
    assert 0 < rates[-1] < 0.01


def test_batches_take_every_example_once_an_epoch():
    job = Job("a", "sgd", {}, 40, 3, "test", 4, 0.05, {}, {})
    batches = _batches(torch.arange(12) + 100, job)
    first = torch.cat([next(batches) for _ in range(3)])
    second = torch.cat([next(batches) for _ in range(3)])
    assert sorted(first.tolist()) == sorted(second.tolist()) == list(range(100, 112))
    assert not torch.equal(first, second)


def test_what_was_reached():
    def row(name, role, n_steps, score, cpu):
        return Row(name, role, {}, n_steps, [score, score], [cpu, cpu], [cpu, cpu])

    rows = [
        row("adamw", "reference", 100, 5.0, 10.0),
        row("sgd", "reference", 100, 6.0, 8.0),
        row("soap", "rival", 100, 3.0, 20.0),
        row("kfac", "kfac", 50, 4.0, 7.0),
        row("kfac", "kfac", 25, 5.5, 3.0),
    ]
    best, rival = reached(rows, 100)
    assert (best.target, best.n_steps, best.share_of_steps, best.share_of_time) == (("adamw", 5.0), 50, 0.5, 0.7)
    assert (rival.target, rival.n_steps) == (("soap", 3.0), None)


def test_unequal_numbers_of_trials_are_refused():
    data, a = DataConfig("molecules"), Contestant("sgd", "reference", [{}])
    with pytest.raises(ValueError, match="equally many trials"):
        TrainKfacConfig(data, {"a": a, "b": Contestant("kfac", "kfac", [{}, {}])}, 10)
    with pytest.raises(ValueError, match='the role "reference"'):
        TrainKfacConfig(data, {"b": Contestant("kfac", "kfac", [{}])}, 10)


def test_muon_is_that_of_torch_up_to_the_rounding_of_bfloat16():
    pytest.importorskip("pytorch_optimizer")
    model = nn.Sequential(nn.Linear(6, 12), nn.ReLU(), nn.Linear(12, 3))
    other, start = copy.deepcopy(model), copy.deepcopy(model)
    matrices, biases = ([p for p in other.parameters() if (p.ndim == 2) == is_matrix] for is_matrix in (True, False))
    options = {"lr": 0.01, "weight_decay": 0.05}
    mine = optimizers.make_optimizers("muon", model, options)
    theirs = [
        torch.optim.Muon(matrices, adjust_lr_fn="match_rms_adamw", **options),
        torch.optim.AdamW(biases, **options),
    ]
    x = torch.randn(20, 6)
    for _ in range(4):
        for net, steps in ((model, mine), (other, theirs)):
            net.zero_grad()
            net(x).square().sum().backward()
            for optimizer in steps:
                optimizer.step()
    for p, q, before in zip(model.parameters(), other.parameters(), start.parameters(), strict=True):
        assert (p - q).norm() < 0.05 * (q - before).norm()


def test_what_is_missing_is_said(monkeypatch):
    monkeypatch.setitem(sys.modules, "pytorch_optimizer", None)
    for name, wanted in (("muon", "Muon"), ("soap", "SOAP")):
        with pytest.raises(SystemExit, match=rf"{wanted} is in .* pip install '.\[experiments\]', or leave {name} out"):
            optimizers.make_optimizers(name, nn.Linear(2, 2), {"lr": 0.1, "weight_decay": 0.0})
    with pytest.raises(SystemExit, match="unknown optimizer 'adam'"):
        optimizers.make_optimizers("adam", nn.Linear(2, 2), {})
