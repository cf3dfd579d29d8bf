"""A model with the weights of a fit but another function is noticed: its outputs on a batch that holds no data."""

import pytest
import torch
from posterior.shared import STRUCTURES
from torch import nn

from laplace_ws import Laplace, load_posterior, marglik_training
from laplace_ws.data import GraphBatch
from laplace_ws.files import FileFormatError, save_tensors
from laplace_ws.posterior import function
from laplace_ws.posterior.function import FunctionFingerprint

OTHER = r"Sequential has the weights of the fit, but computes another function: its outputs on a fixed batch differ .* by [\d.]+ %"


def network(activation=nn.ReLU, dtype=torch.float32):
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(5, 16), activation(), nn.Linear(16, 16), activation(), nn.Linear(16, 3)).to(dtype)


def data(dtype=torch.float32):
    torch.manual_seed(1)
    return torch.randn(12, 5, dtype=dtype), torch.arange(12) % 3


def fitted(model, structure="kron", dtype=torch.float32):
    la = Laplace(model, "classification", hessian_structure=structure)
    la.fit([data(dtype)])
    return la


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
@pytest.mark.parametrize("activation", [lambda: nn.LeakyReLU(0.01), nn.GELU, nn.Tanh])
def test_a_posterior_is_not_used_beside_another_activation(activation, dtype, tmp_path):
    if dtype is torch.bfloat16 and isinstance(activation(), nn.LeakyReLU):
        pytest.skip("0.01 of the negative part is what bfloat16 rounds away")
    model, (x, _) = network(dtype=dtype), data(dtype)
    fitted(model, dtype=dtype).save(tmp_path / "la.pt")
    expected = load_posterior(tmp_path / "la.pt", model)(x)
    other = network(activation, dtype)
    restored = load_posterior(tmp_path / "la.pt", other)
    for use in (lambda: restored(x), lambda: restored(x, pred_type="nn"), restored.check_weights):
        with pytest.raises(ValueError, match=f"{OTHER}; put back the modules and settings"):
            use()
    torch.testing.assert_close(load_posterior(tmp_path / "la.pt", network(dtype=dtype))(x), expected)


@pytest.mark.parametrize("structure", STRUCTURES)
def test_a_live_model_whose_activation_is_replaced_is_noticed(structure):
    model, (x, y) = network(), data()
    la = fitted(model, structure)
    expected, relu = la(x), model[1]
    model[1] = nn.GELU()
    with pytest.raises(ValueError, match=OTHER):
        la(x)
    with pytest.raises(ValueError, match=OTHER):
        la.fit([(x, y)], override=False)
    model[1] = relu
    assert torch.equal(la(x), expected)


def test_a_setting_of_a_module_that_is_changed_is_noticed():
    model = network(lambda: nn.LeakyReLU(0.1))
    la = fitted(model)
    la(data()[0])
    model[1].negative_slope = 0.3
    with pytest.raises(ValueError, match=OTHER):
        la(data()[0])


def test_the_model_is_run_for_it_only_where_something_has_changed(monkeypatch):
    runs = []
    run = function._outputs
    monkeypatch.setattr(function, "_outputs", lambda *a: runs.append(1) or run(*a))
    model, (x, _) = network(), data()
    la = fitted(model)
    assert len(runs) == 1  # by the fit
    for _ in range(3):
        la(x)
        la(x, pred_type="nn", n_samples=2)
    assert len(runs) == 2
    model[1].inplace = True
    for _ in range(3):
        la(x)
    assert len(runs) == 3


def test_a_training_gives_a_posterior_that_knows_its_function():
    result = marglik_training(network(), [data()], n_epochs=1)
    la = result.la if hasattr(result, "la") else result[0]
    assert la.fitted.function is not None


# ------------------------------------------------------------------ the batch


def test_no_number_of_the_data_is_kept(tmp_path):
    la = fitted(network())
    state = la.state_dict()["function"]
    assert state["recipe"] == {"tensor": {"shape": [2, 5], "dtype": "float32", "largest": 0}}
    assert state["outputs"].shape == (6,)
    la.save(tmp_path / "la.pt")
    torch.load(tmp_path / "la.pt", weights_only=True)


class Several(nn.Module):
    """Takes a mapping of tokens, a mask over them and one over positions, and a number."""

    def __init__(self):
        super().__init__()
        self.embed, self.head = nn.Embedding(11, 4), nn.Linear(4, 3)
        self.activation = torch.tanh

    def forward(self, batch, scale):
        h = self.embed(batch["input_ids"]) * batch["mask"][..., None] * batch["positions"][0][:, None]
        assert batch["mask"].any(1).all()
        return self.head(self.activation(h.mean(1))) * scale


def several(n=6):
    ids = torch.randint(11, (n, 4))
    ids[0, 0] = 10
    mask = torch.ones(n, 4, dtype=torch.bool)
    return (
        {"input_ids": ids, "mask": mask, "positions": (torch.ones(1, 4)[0],), "name": "text"},
        2.0,
        torch.arange(n) % 3,
    )


def test_the_batch_has_the_form_of_the_inputs(tmp_path):
    model, batch = Several(), several()
    la = Laplace(model, "classification")
    la.fit([batch])
    recipe = la.fitted.function.recipe
    assert recipe["arguments"][0]["dict"]["input_ids"] == {"tensor": {"shape": [2, 4], "dtype": "int64", "largest": 10}}
    la.save(tmp_path / "la.pt")
    restored = load_posterior(tmp_path / "la.pt", model)
    restored(batch[:2])
    model.activation = torch.relu
    for posterior in (la, restored):
        with pytest.raises(ValueError, match="Several has the weights of the fit, but computes another function"):
            posterior(batch[:2])


def test_random_numbers_are_those_of_a_generator_of_its_own():
    model, (x, _) = network(), data()
    rng = torch.get_rng_state()
    first = FunctionFingerprint.of(model, x)
    assert torch.equal(torch.get_rng_state(), rng)
    torch.manual_seed(3)
    assert torch.equal(FunctionFingerprint.of(model, x).outputs, first.outputs)


class OnNodes(nn.Module):
    def __init__(self):
        super().__init__()
        self.head = nn.Linear(2, 3)

    def forward(self, graphs):
        return self.head(graphs.mean(graphs.nodes))


def test_where_no_batch_can_be_made_there_is_none(tmp_path):
    graphs = GraphBatch.from_graphs([(torch.randn(3, 2), torch.zeros(2, 0).long()) for _ in range(5)])
    la = Laplace(OnNodes(), "classification")
    la.fit([(graphs, torch.arange(5) % 3)])
    assert la.fitted.function is None
    la.save(tmp_path / "la.pt")
    load_posterior(tmp_path / "la.pt", la.model)(graphs)


class Picky(nn.Linear):
    """Raises for inputs that cannot be data."""

    def forward(self, x):
        assert (x >= 0).all(), "no data"
        return super().forward(x)


def test_a_model_that_takes_nothing_but_data_has_none():
    la = Laplace(Picky(5, 3), "classification")
    la.fit([(torch.rand(6, 5), torch.arange(6) % 3)])
    assert la.fitted.function is None
    la(torch.rand(2, 5))


def test_a_model_that_fails_on_the_batch_only_now_is_another():
    model, (x, _) = network(), data()
    la = fitted(model)
    model.register_forward_pre_hook(lambda module, arguments: (_ for _ in ()).throw(KeyError("weather")))
    with pytest.raises(ValueError, match=r"fails on a fixed batch on which it did not then \('weather'\)"):
        la(x)


# ------------------------------------------------------------------ files


def test_a_file_from_before_is_loaded_as_it_was(tmp_path):
    la = fitted(network())
    state = la.state_dict()
    del state["function"]
    save_tensors(tmp_path / "old.pt", state)
    restored = load_posterior(tmp_path / "old.pt", network(nn.GELU))
    assert restored.fitted.function is None
    restored(data()[0])


@pytest.mark.parametrize(
    "damage",
    [
        lambda f: f.pop("recipe"),
        lambda f: f.pop("outputs"),
        lambda f: f.update(outputs=torch.full((6,), torch.nan)),
        lambda f: f.update(recipe={"tensor": {"shape": [2, 5], "dtype": "float33", "largest": 0}}),
        lambda f: f.update(recipe={"tensor": {"shape": [2, 10**12], "dtype": "float32", "largest": 0}}),
        lambda f: f.update(recipe={"tensor": {"shape": [2, 5], "dtype": "float32", "largest": -1}}),
        lambda f: f.update(recipe={"arguments": [{"dict": {"a": {"value": object}}}]}),
        lambda f: f.update(recipe={"folder": "/"}),
        lambda f: f.update(recipe={}),
    ],
)
def test_a_damaged_recipe_is_said(damage):
    la = fitted(network())
    state = la.state_dict()
    state["function"] = dict(state["function"])
    damage(state["function"])
    with pytest.raises(FileFormatError, match=r"damaged|not finite"):
        fitted(network()).load_state_dict(state)


def test_the_precision_of_products_is_left_as_it_was():
    settings = (torch.backends.cuda.matmul, torch.backends.cudnn.conv)
    before = [setting.fp32_precision for setting in settings]
    with function._float32_in_full():
        assert [setting.fp32_precision for setting in settings] == ["ieee", "ieee"]
    assert [setting.fp32_precision for setting in settings] == before
