"""Saved posteriors: whole, plain, and refused where they do not fit."""

import pickle
import warnings

import pytest
import torch
from cases import CASES
from posterior.shared import STRUCTURES, case_of, fitted
from torch import nn

from laplace_ws import Categorical, Gaussian, Laplace, load_posterior
from laplace_ws.files import FileFormatError, save_tensors

OPTIONS = {
    "curvature": "ggn_mc",
    "mc_samples": 2,
    "prior_precision": 2.0,
    "prior_mean": 0.1,
    "temperature": 1.2,
    "dict_key_x": "pixels",
    "dict_key_y": "target",
    "memory_budget": 12345,
    "class_names": ["a", "b", "c"],
}


def of_structure(structure):
    if structure == "lowrank":
        return {"rank": 7}
    return {"kfac_approx": "expand", "factor_precision": "bf16"} if structure in ("kron", "ekfac") else {}


@pytest.mark.parametrize("structure", STRUCTURES)
def test_a_file_carries_every_option(structure, tmp_path):
    la, x, _ = fitted(structure, "cnn", backend="backpack", **OPTIONS, **of_structure(structure))
    la.save(tmp_path / "la.pt")
    restored = load_posterior(tmp_path / "la.pt", la.model)
    assert type(restored) is type(la)
    assert restored.options == la.options
    assert restored.backend.name == "backpack"
    for name in ("keys", "memory_budget", "class_names", "n_data", "n_outputs", "parameter_names", "mc_samples"):
        assert getattr(restored, name) == getattr(la, name)
    for name in ("prior_precision", "prior_mean", "temperature", "mean"):
        assert torch.equal(getattr(restored, name), getattr(la, name))
    assert restored.log_marginal_likelihood() == la.log_marginal_likelihood()
    assert torch.equal(restored(x), la(x))
    assert torch.equal(*[p.sample(2, torch.Generator().manual_seed(3)) for p in (la, restored)])
    restored.fit([(x, torch.zeros(len(x), dtype=torch.long))], override=False)
    assert restored.n_data == 2 * la.n_data


@pytest.mark.parametrize("subset", ["last_layer", ["0.bias", "2"], "subnetwork"])
def test_a_file_carries_what_is_covered(subset, tmp_path):
    model, x, y = case_of("mlp").make()
    indices = {"subnetwork_indices": [0, 3, 17]} if subset == "subnetwork" else {}
    la = Laplace(model, "classification", subset, "diag", **indices)
    la.fit([(x, y)])
    la.save(tmp_path / "la.pt")
    restored = load_posterior(tmp_path / "la.pt", model)
    assert restored.shapes == la.shapes
    assert torch.equal(restored(x), la(x))


@pytest.mark.parametrize(
    "likelihood", [Gaussian(0.3, output_scales=[1.0, 2.0, 0.5]), "regression", "heteroscedastic_regression"]
)
def test_a_file_carries_the_likelihood(likelihood, tmp_path):
    n_outputs = 6 if likelihood == "heteroscedastic_regression" else 3
    model, x, y = nn.Linear(2, n_outputs), torch.randn(5, 2), torch.randn(5, 3)
    la = Laplace(model, likelihood)
    la.fit([(x, y)])
    la.save(tmp_path / "la.pt")
    restored = load_posterior(tmp_path / "la.pt", model)
    assert restored.sigma_noise == la.sigma_noise
    torch.testing.assert_close(restored(x, observation_noise=True), la(x, observation_noise=True))


def test_a_file_is_plain_and_names_what_it_is_of(tmp_path):
    la, _, _ = fitted("kron", "frozen-layers")
    la.save(tmp_path / "la.pt")
    state = torch.load(tmp_path / "la.pt", weights_only=True)
    assert state["format_version"] == 2
    assert state["model_parameters"] == {name: tuple(p.shape) for name, p in la.model.named_parameters()}
    assert len(state["model_parameters"]) > len(la.parameter_names)


def test_the_models_weights_are_left_alone_and_can_be_put_in_place(tmp_path):
    la, x, _ = fitted("kron", "mlp")
    expected = la(x)
    la.save(tmp_path / "la.pt")
    other, _, _ = case_of("mlp").make()
    with torch.no_grad():
        other[0].weight.mul_(2)
    restored = load_posterior(tmp_path / "la.pt", other)
    with pytest.raises(ValueError, match="not those of the fit"):
        restored(x)
    restored.load_mean()
    torch.testing.assert_close(restored(x), expected)


def test_another_kind_of_device_is_said():
    la, _, _ = fitted("kron")
    state = la.state_dict() | {"device": "meta"}
    with pytest.warns(UserWarning, match=f"saved on meta and is loaded on {la.mean.device}"):
        la.load_state_dict(state)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        la.load_state_dict(la.state_dict())


def test_what_does_not_match_is_said(tmp_path):
    la, _, _ = fitted("kron", "mlp")
    la.save(tmp_path / "la.pt")
    state = la.state_dict()
    with pytest.raises(ValueError, match="has hessian_structure='kron', this one 'diag'"):
        Laplace(la.model, "classification", hessian_structure="diag").load_state_dict(state)
    with pytest.raises(ValueError, match="has likelihood="):
        Laplace(la.model, Categorical(ignore_index=1)).load_state_dict(state)
    wider = nn.Sequential(nn.Linear(3, 5), nn.Tanh(), nn.Linear(5, 3))
    for load in (
        lambda: Laplace(wider, "classification").load_state_dict(state),
        lambda: load_posterior(tmp_path / "la.pt", wider),
    ):
        with pytest.raises(
            ValueError, match=r"saved posterior has '0\.weight' of shape .*, and the model has one of shape \[5, 3\]"
        ):
            load()
    deeper = nn.Sequential(*la.model, nn.Linear(3, 3))
    with pytest.raises(ValueError, match=r"has no '3\.weight', and the model has one of shape \[3, 3\]"):
        load_posterior(tmp_path / "la.pt", deeper)
    head = Laplace(la.model, "classification", "last_layer")
    with pytest.raises(ValueError, match=r"has '0\.weight' of shape .* and this posterior has none"):
        head.load_state_dict(state)
    chosen = [Laplace(la.model, "classification", "subnetwork", "diag", subnetwork_indices=[i]) for i in (0, 1)]
    model, x, y = case_of("mlp").make()
    chosen[0].model.load_state_dict(model.state_dict())
    chosen[0].fit([(x, y)])
    with pytest.raises(ValueError, match="covers other weights of the subnetwork"):
        chosen[1].load_state_dict(chosen[0].state_dict())


class Foreign:
    """Pickled, it would run code."""

    def __reduce__(self):
        return (print, ("this ran",))


@pytest.mark.parametrize("content", ["truncated", "empty", "text", "pickle", "torch", "list", "old"])
def test_damaged_and_foreign_files_are_refused_in_a_sentence(content, tmp_path, capsys):
    la, _, _ = fitted("kron", "mlp")
    path = tmp_path / "la.pt"
    la.save(path)
    whole = path.read_bytes()
    if content == "torch":
        torch.save({"weights": torch.ones(2)}, path)
    elif content == "list":
        torch.save([1, 2], path)
    elif content == "old":
        torch.save(la.state_dict() | {"format_version": 1}, path)
    else:
        contents = {
            "truncated": whole[: len(whole) // 2],
            "empty": b"",
            "text": b"hello",
            "pickle": pickle.dumps(Foreign()),
        }
        path.write_bytes(contents[content])
    with pytest.raises(FileFormatError) as error:
        load_posterior(path, la.model)
    message = str(error.value)
    assert str(path) in message
    assert "\n" not in message
    assert message.endswith(".")
    assert len(message) < 400
    assert "this ran" not in capsys.readouterr().out


def test_a_file_that_is_not_there():
    with pytest.raises(FileNotFoundError):
        load_posterior("nowhere.pt", nn.Linear(2, 2))


def changed(value, change):
    """A nested state with a change of every tensor, if there is one."""
    if isinstance(value, dict):
        return {key: changed(item, change) for key, item in value.items()}
    return change(value.clone()) if isinstance(value, torch.Tensor) else value


def with_first(number):
    def change(tensor):
        tensor[(0,) * tensor.ndim] = number
        return tensor

    return change


def askew(tensor):
    if tensor.ndim > 1 and tensor.shape[-1] > 1:
        tensor[..., 0, 1] += 0.1 * tensor.abs().max()
    return tensor


ENTRIES = {
    "format": ("other", "this is no posterior"),
    "format_version": (3, "this is a posterior of format 3, and this version reads format 2"),
    "device": (1, "'device' is a int and not a string"),
    "options": ([], "'options' is a list and not a dictionary"),
    "subset": ({"parameters": {"0.weight": (5, 3)}}, "'selection' is missing"),
    "model_parameters": ({"0.weight": "many"}, "'0.weight': 'many', which is no shape"),
    "n_arguments": (0, "'n_arguments' is 0 and must be at least 1"),
    "surroundings": ({"names": ["a"], "fingerprint": torch.zeros(0, 2)}, "'surroundings' is not two sums for each tensor"),
    "mean": (torch.zeros(3), r"mean has shape \[3\] in place of \[\d+\]"),
    "H": (None, "'H' is a NoneType and not a dictionary"),
    "nll_sum": (float("nan"), "'nll_sum' is nan and must be finite"),
    "n_data": (0, "'n_data' is 0 and must be at least 1"),
    "n_targets": (-1, "'n_targets' is -1 and must be finite and above 0"),
    "output_shape": ([0.5], r"'output_shape' is \[0.5\] and must be a list of whole numbers"),
    "prior_precision": (torch.tensor(-1.0), "prior_precision must be positive, but its smallest entry is -1"),
    "prior_mean": (torch.tensor(float("inf")), "prior_mean must be finite"),
    "sigma_noise": (torch.tensor(2.0), "likelihood has no sigma_noise"),
    "temperature": (torch.tensor(0.0), "temperature must be one positive number"),
    "class_names": ([1], r"'class_names' is \[1\] and must be a list of strings"),
}  # fmt: skip
"""What each entry of a state may not be, and what is said of it."""
ONLY_FILES = {
    "backend": (None, "'backend' is a NoneType and not a string"),
    "dict_key_x": (1, "'dict_key_x' is a int"),
    "dict_key_y": (1, "'dict_key_y' is a int"),
    "memory_budget": (0, "'memory_budget' is 0 and must be at least 1"),
}
"""What only `load_posterior` reads."""


@pytest.mark.parametrize("name", [*ENTRIES, *ONLY_FILES])
def test_an_entry_that_is_missing_or_cannot_be_is_said(name, tmp_path):
    la, x, _ = fitted("kron", "mlp")
    expected, state, path = la(x), la.state_dict(), tmp_path / "la.pt"
    # the last two are lacking in files from before they were kept
    assert state.keys() == {*ENTRIES, *ONLY_FILES, "function", "covariance_scale"}
    value, says = (ENTRIES | ONLY_FILES)[name]
    lacking = {key: entry for key, entry in state.items() if key != name}
    for damaged, pattern in ((state | {name: value}, says), (lacking, "is missing|is no posterior|of format None")):
        save_tensors(path, damaged)
        with pytest.raises(FileFormatError, match=pattern) as error:
            load_posterior(path, la.model)
        assert str(error.value).startswith(f"'{path}': ")
        if name in ENTRIES:
            with pytest.raises(FileFormatError, match=pattern):
                la.load_state_dict(damaged)
    assert torch.equal(la(x), expected)


@pytest.mark.parametrize("structure", STRUCTURES)
@pytest.mark.parametrize(
    ("change", "says"),
    [
        (with_first(float("nan")), "not finite"),
        (with_first(float("inf")), "not finite"),
        (with_first(-1e6), "can be below 0|negative number on its diagonal|length is not one|not symmetric"),
        (lambda tensor: tensor.long(), "torch.int64 and not a tensor of real numbers"),
        (lambda tensor: tensor[None], "shape|is not square|do not fit"),
        (lambda tensor: None, "NoneType"),
        (askew, "not symmetric|length is not one"),
    ],
)  # fmt: skip
def test_values_that_a_curvature_cannot_have_are_said(structure, change, says):
    la, x, _ = fitted(structure, "mlp")
    if change is askew and structure == "diag":
        pytest.skip("a diagonal is always symmetric")
    expected, state = la(x), la.state_dict()
    with pytest.raises(FileFormatError, match=says) as error:
        la.load_state_dict(state | {"H": changed(state["H"], change)})
    assert "\n" not in str(error.value)
    assert torch.equal(la(x), expected)


def test_factors_as_rounded_as_they_can_be_are_accepted():
    """In bfloat16, and scaled far from one."""
    for structure in STRUCTURES:
        for scale in (1e-12, 1e12):
            la, _, _ = fitted(structure, "cnn", **of_structure(structure))
            state = la.state_dict()
            state["H"] = (la.H * scale).state_dict()
            la.load_state_dict(state)


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_what_a_fit_gives_is_accepted(case):
    """Grouped, transposed and diagonal factors, too."""
    for structure in ("kron", "ekfac"):
        la, _, _ = fitted(structure, case)
        la.load_state_dict(la.state_dict())


@pytest.mark.parametrize(
    ("places", "says"),
    [
        ([0, 3, 999], "not among its weights"),
        ([-1, 3], "not among its weights"),
        ([3, 3], "not among its weights"),
        ([0.0, 3.0], "are not indices"),
    ],
)  # fmt: skip
def test_a_subnetwork_that_is_none_is_said(places, says, tmp_path):
    model, x, y = case_of("mlp").make()
    la = Laplace(model, "classification", "subnetwork", "diag", subnetwork_indices=[0, 3])
    la.fit([(x, y)])
    state = la.state_dict()
    (name,) = state["subset"]["selection"]
    state["subset"]["selection"][name] = torch.tensor(places)
    save_tensors(tmp_path / "la.pt", state)
    with pytest.raises(FileFormatError, match=says):
        load_posterior(tmp_path / "la.pt", model)
