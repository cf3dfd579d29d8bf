"""The callbacks for other libraries; what needs Lightning or transformers is left out where they are not installed."""

from __future__ import annotations

import csv
import importlib
import math
import sys

import pytest
import torch
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

from laplace_ws import Laplace, NotFittedError, marglik_training
from laplace_ws.callbacks.fit import EVIDENCE, PosteriorFits
from laplace_ws.callbacks.tensorboard import ScalarWriter, TensorBoardLogger

N, C = 24, 3


def data() -> TensorDataset:
    generator = torch.Generator().manual_seed(0)
    return TensorDataset(torch.randn(N, 4, generator=generator), torch.arange(N) % C)


def network() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(4, 5), nn.Tanh(), nn.Linear(5, C))


# ------------------------------------------------------------------ fits


def test_a_fit_chooses_prior_and_noise_at_the_optimum():
    x, y = data().tensors[0], torch.randn(N, C)
    fits = PosteriorFits("regression", options={"hessian_structure": "diag"})
    with pytest.raises(NotFittedError, match="train with it first"):
        _ = fits.la
    evidence = fits.fit(network(), [(x, y)], epoch=3)
    expected = Laplace(network(), "regression", hessian_structure="diag").fit([(x, y)])
    as_it_was = expected.log_marginal_likelihood().item()
    expected.optimize_prior_precision("marglik", prior_structure="layerwise", optimize_noise=True)
    assert evidence == expected.log_marginal_likelihood().item() > as_it_was
    assert fits.history == {3: evidence}
    assert fits.la.hessian_structure == "diag"
    left = PosteriorFits("regression", None, options={"hessian_structure": "diag"}).fit(network(), [(x, y)], 1)
    assert left == as_it_was


def test_fits_are_due_every_few_epochs():
    assert [epoch for epoch in range(1, 8) if PosteriorFits("binary", every_n_epochs=3).is_due(epoch)] == [3, 6]
    assert not PosteriorFits("binary").is_due(1)
    with pytest.raises(ValueError, match="every_n_epochs must be at least 1, got 0"):
        PosteriorFits("binary", every_n_epochs=0)


# ------------------------------------------------------------------ TensorBoard


class Writer:
    def __init__(self):
        self.curves = {}

    def add_scalar(self, tag, scalar_value, global_step):
        self.curves.setdefault(tag, {})[global_step] = scalar_value


def train(on_epoch, likelihood="classification", targets=None):
    x, y = data().tensors
    return marglik_training(
        network(), [(x, y if targets is None else targets)], likelihood, n_epochs=4, n_epochs_burnin=1, marglik_frequency=2,
        fit_fraction=1.0, progress_bar=False, on_epoch=on_epoch,
    )  # fmt: skip


def test_each_number_of_the_records_is_a_curve():
    writer = Writer()
    result = train(TensorBoardLogger(writer))
    assert isinstance(writer, ScalarWriter)
    for name in ("train_nll", "train_accuracy", "loss", "temperature", "lr", "seconds"):
        assert writer.curves[name] == {record["epoch"]: record[name] for record in result.history}
    tuned = {record["epoch"]: record[EVIDENCE] for record in result.history if record[EVIDENCE] is not None}
    assert writer.curves[EVIDENCE] == tuned
    assert 1 <= len(tuned) < 4
    last = result.history[-1]["prior_precision"]
    assert {tag: curve[4] for tag, curve in writer.curves.items() if "/" in tag} == {
        f"prior_precision/{name}": value for name, value in last.items()
    }
    assert "sigma_noise" not in writer.curves  # there is none
    assert "epoch" not in writer.curves


def test_what_another_function_adds_is_written_too():
    writer = Writer()
    logger = TensorBoardLogger(writer, "run1/", lambda record: record.update(test_nll=0.5, note="fine", done=True))
    train(logger, "regression", torch.randn(N, C))
    assert writer.curves["run1/test_nll"] == dict.fromkeys(range(1, 5), 0.5)
    assert math.isfinite(writer.curves["run1/sigma_noise"][4])
    assert not {"run1/note", "run1/done"} & set(writer.curves)


def test_with_tensorboard_itself(tmp_path):
    pytest.importorskip("tensorboard")
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
    from torch.utils.tensorboard import SummaryWriter

    writer = SummaryWriter(tmp_path)
    result = train(TensorBoardLogger(writer))
    writer.close()
    read = EventAccumulator(str(tmp_path)).Reload()
    found = {event.step: event.value for event in read.Scalars("train_nll")}
    assert found == pytest.approx({record["epoch"]: record["train_nll"] for record in result.history})
    assert "prior_precision/0.weight" in read.Tags()["scalars"]


# ------------------------------------------------------------------ Lightning


def lit(module, whole: bool):
    """A LightningModule that is a network, or has one."""

    class Lit(module.LightningModule):
        def __init__(self):
            super().__init__()
            self.net = network()

        def forward(self, x):
            if not whole:
                raise AssertionError("the network is a part of it")
            return self.net(x)

        def training_step(self, batch, _):
            x, y = batch if isinstance(batch[0], torch.Tensor) else batch[0]  # of two loaders, the first
            return nn.functional.cross_entropy(self.net(x), y)

        def configure_optimizers(self):
            return torch.optim.SGD(self.parameters(), lr=0.1)

    return Lit()


@pytest.fixture(params=["lightning.pytorch", "pytorch_lightning"])
def library(request):
    return pytest.importorskip(request.param)


@pytest.fixture
def callback_class(library, monkeypatch):
    """The class for one of Lightning's two names, as in a program that knows no other."""
    other = {"lightning.pytorch": "pytorch_lightning", "pytorch_lightning": "lightning.pytorch"}[library.__name__]
    monkeypatch.delitem(sys.modules, other, raising=False)
    monkeypatch.delitem(sys.modules, "laplace_ws.callbacks.lightning", raising=False)
    return importlib.import_module("laplace_ws.callbacks.lightning").LaplaceCallback


def lightning_trainer(library, tmp_path, *callbacks, **options):
    quiet = {"enable_progress_bar": False, "enable_model_summary": False, "enable_checkpointing": False}
    defaults = {"max_epochs": 4, "accelerator": "cpu", "default_root_dir": tmp_path, **quiet}
    return library.Trainer(callbacks=list(callbacks), **defaults | {"logger": False} | options)


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("whole", [True, False])
def test_lightning(library, callback_class, tmp_path, whole):
    callback = callback_class("classification", network="" if whole else "net", hessian_structure="full")
    assert isinstance(callback, library.Callback)
    module, loader = lit(library, whole), DataLoader(data(), batch_size=7)
    trainer = lightning_trainer(library, tmp_path, callback)
    trainer.fit(module, loader)
    expected = Laplace(module.net, "classification", hessian_structure="full").fit(loader)
    expected.optimize_prior_precision("marglik", prior_structure="layerwise")
    x = data().tensors[0]
    assert callback.la.n_data == N
    torch.testing.assert_close(callback.la(x), expected(x))
    assert callback.history == {4: pytest.approx(expected.log_marginal_likelihood().item(), rel=1e-6)}


@pytest.mark.filterwarnings("ignore")
def test_lightning_logs_the_evidence_that_other_callbacks_monitor(library, callback_class, tmp_path):
    callback = callback_class("classification", network="net", every_n_epochs=2)
    importlib.import_module(f"{library.__name__}.callbacks")
    best = library.callbacks.ModelCheckpoint(tmp_path, monitor=EVIDENCE, mode="max", every_n_epochs=2)
    logger = importlib.import_module(f"{library.__name__}.loggers").CSVLogger(tmp_path)
    options = {"enable_checkpointing": True, "max_epochs": 5, "logger": logger, "log_every_n_steps": 1}
    trainer = lightning_trainer(library, tmp_path, callback, best, **options)
    trainer.fit(lit(library, whole=False), DataLoader(data(), batch_size=7))
    assert list(callback.history) == [2, 4, 5]
    assert best.best_model_score.item() == pytest.approx(max(callback.history[2], callback.history[4]))
    rows = csv.DictReader((tmp_path / "lightning_logs" / "version_0" / "metrics.csv").open())
    logged = [float(row[EVIDENCE]) for row in rows if row[EVIDENCE]]
    assert logged == pytest.approx([callback.history[epoch] for epoch in (2, 4, 5)])


@pytest.mark.filterwarnings("ignore")
def test_lightning_says_what_is_wrong(library, callback_class, tmp_path):
    module, loader = lit(library, whole=False), DataLoader(data(), batch_size=7)
    with pytest.raises(ValueError, match=r"^network='body' is no submodule of Lit; choose one of net\.$"):
        lightning_trainer(library, tmp_path, callback_class("classification", network="body")).fit(module, loader)
    loaders = [loader, loader]
    with pytest.raises(TypeError, match=r"^the trainer's training data are a list, not one loader; pass the callback"):
        lightning_trainer(library, tmp_path, callback_class("classification", network="net")).fit(module, loaders)
    callback = callback_class("classification", network="net", train_loader=loader)
    lightning_trainer(library, tmp_path, callback).fit(module, loaders)
    assert callback.la.n_data == N


# ------------------------------------------------------------------ Hugging Face


@pytest.mark.filterwarnings("ignore")
def test_hugging_face(tmp_path):
    transformers = pytest.importorskip("transformers")
    from laplace_ws.callbacks.huggingface import LaplaceCallback, TakesBatch

    torch.manual_seed(0)
    size = {"hidden_size": 8, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 16}
    config = transformers.BertConfig(vocab_size=11, max_position_embeddings=8, num_labels=C, **size)
    model = transformers.BertForSequenceClassification(config)
    tokens = torch.randint(1, 11, (N, 6))
    rows = [{"input_ids": row, "attention_mask": torch.ones_like(row), "labels": n % C} for n, row in enumerate(tokens)]
    callback = LaplaceCallback("classification", subset_of_weights="last_layer", every_n_epochs=2)
    trainer = transformers.Trainer(
        model,
        transformers.TrainingArguments(
            str(tmp_path),
            num_train_epochs=3,
            per_device_train_batch_size=7,
            report_to=[],
            save_strategy="no",
            use_cpu=True,
            disable_tqdm=True,
        ),
        train_dataset=rows,
        callbacks=[callback],
    )
    trainer.train()
    assert list(callback.history) == [2, 3]
    logged = {round(entry["epoch"]): entry[EVIDENCE] for entry in trainer.state.log_history if EVIDENCE in entry}
    assert logged == callback.history
    batch = {"input_ids": tokens, "attention_mask": torch.ones_like(tokens), "labels": torch.arange(N) % C}
    expected = Laplace(TakesBatch(model), "classification", "last_layer").fit([batch])
    expected.optimize_prior_precision("marglik", prior_structure="layerwise")
    assert callback.la.parameter_names == ("model.classifier.weight", "model.classifier.bias")
    torch.testing.assert_close(callback.la(batch), expected(batch), rtol=1e-4, atol=1e-5)
    assert callback.la.predict(batch).shape == (N,)


# ------------------------------------------------------------------ the dependencies


@pytest.mark.parametrize(
    ("module", "missing", "sentence"),
    [
        (
            "lightning",
            ["lightning.pytorch", "pytorch_lightning"],
            "needs Lightning; install it by: pip install lightning.",
        ),
        (
            "huggingface",
            ["transformers"],
            "needs Hugging Face's transformers; install it by: pip install transformers.",
        ),
    ],
)
def test_without_the_library_there_is_a_sentence(module, missing, sentence, monkeypatch):
    for name in missing:
        monkeypatch.setitem(sys.modules, name, None)
    monkeypatch.delitem(sys.modules, f"laplace_ws.callbacks.{module}", raising=False)
    with pytest.raises(ImportError) as raised:
        importlib.import_module(f"laplace_ws.callbacks.{module}")
    assert str(raised.value) == f"laplace_ws.callbacks.{module} {sentence}"
