"""laplace-torch itself as an oracle: the same program, with the import changed alone, gives the same numbers."""

import copy
import importlib

import pytest
import torch
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

from laplace_ws.compat import laplace_torch as ours

theirs = pytest.importorskip("laplace", reason="laplace-torch is in the extra 'bench'", exc_type=ImportError)

pytestmark = pytest.mark.filterwarnings("ignore")
BOTH = (ours, theirs)
LIKELIHOODS = ["classification", "regression"]
KEYS = [(subset, structure) for subset in ("all", "last_layer") for structure in ("full", "kron", "diag")]


def module(library, name):
    return importlib.import_module(f"{library.__name__}.{name}")


def mlp():
    return nn.Sequential(nn.Linear(3, 6), nn.Tanh(), nn.Linear(6, 2)).double()


def cnn():
    convolutions = (nn.Conv2d(2, 3, 3, padding=1), nn.Tanh(), nn.Conv2d(3, 2, 3, stride=2), nn.Tanh())
    return nn.Sequential(*convolutions, nn.Flatten(), nn.Linear(8, 2)).double()


def data(likelihood, make=mlp, n=11):
    torch.manual_seed(1)
    x = torch.randn(n, *((3,) if make is mlp else (2, 5, 5)), dtype=torch.float64)
    y = torch.arange(n) % 2 if likelihood == "classification" else torch.randn(n, 2, dtype=torch.float64)
    return DataLoader(TensorDataset(x, y), batch_size=4)


def pair(likelihood, subset="all", structure="full", make=mlp, backend="curvlinops.CurvlinopsGGN", **options):
    """Both libraries' posteriors of one network and data set, and the inputs."""
    fitted = []
    for library in BOTH:
        torch.manual_seed(0)
        file, name = backend.split(".")
        own = {"backend": getattr(module(library, f"curvature.{file}"), name)}
        if likelihood == "regression" and "sigma_noise" not in options:
            own["sigma_noise"] = 0.7
        la = library.Laplace(make(), likelihood, subset, structure, **own, **options)
        la.fit(data(likelihood, make))
        fitted.append(la)
    return *fitted, data(likelihood, make).dataset.tensors[0]


def close(a, b, **options):
    """To the rounding of float32, in which curvlinops multiplies its dense matrices."""
    a, b = (torch.as_tensor(value).detach() for value in (a, b))
    assert a.dtype == b.dtype
    torch.testing.assert_close(a, b, **{"rtol": 2e-6, "atol": 2e-7, **options})


def dense(matrix, exponent=1):
    if isinstance(matrix, torch.Tensor):
        matrix = matrix if matrix.ndim == 2 else torch.diag(matrix)
        return matrix if exponent == 1 else torch.linalg.inv(matrix)
    return matrix.to_matrix(exponent=exponent)


@pytest.mark.parametrize("make", [mlp, cnn])
@pytest.mark.parametrize("likelihood", LIKELIHOODS)
@pytest.mark.parametrize("key", KEYS, ids="-".join)
def test_curvature_evidence_and_density(key, likelihood, make):
    if make is cnn and key == ("all", "full"):
        pytest.skip("curvlinops' own dense GGN is of these layers too, and slow")
    a, b, _ = pair(likelihood, *key, make, prior_precision=0.6, prior_mean=0.1)
    close(dense(a.H), dense(b.H))
    close(dense(a.posterior_precision), dense(b.posterior_precision))
    for name in (
        "loss",
        "log_likelihood",
        "scatter",
        "log_det_ratio",
        "log_det_posterior_precision",
        "prior_precision",
    ):
        close(getattr(a, name), getattr(b, name))
    assert (a.n_data, a.n_outputs, a.n_params, a.n_layers) == (b.n_data, b.n_outputs, b.n_params, b.n_layers)
    close(a.log_marginal_likelihood(), b.log_marginal_likelihood())
    theta = torch.randn(a.n_params, dtype=torch.float64)
    close(a.log_prob(theta), b.log_prob(theta))
    close(a.square_norm(theta), b.square_norm(theta))


@pytest.mark.parametrize("key", KEYS, ids="-".join)
def test_predictions(key):
    a, b, x = pair("classification", *key, prior_precision=0.6)
    for link in ("probit", "bridge", "bridge_norm"):
        close(a(x, link_approx=link), b(x, link_approx=link))
    draws = [torch.Generator().manual_seed(0) for _ in BOTH]
    if key[1] != "full":  # whose root of the covariance is another
        close(a.sample(5, draws[0]), b.sample(5, draws[1]))
    a, b, x = pair("regression", *key, prior_precision=0.6)
    for options in ({}, {"joint": True}, {"diagonal_output": True}, {"joint": True, "diagonal_output": True}):
        for found, truth in zip(a(x, **options), b(x, **options), strict=True):
            close(found, truth)


@pytest.mark.parametrize("likelihood", LIKELIHOODS)
@pytest.mark.parametrize(
    ("structure", "prior_structure"), [("kron", "layerwise"), ("full", "layerwise"), ("diag", "diag")]
)
def test_prior_precisions_chosen_by_the_evidence(structure, prior_structure, likelihood):
    a, b, _ = pair(likelihood, "all", structure)
    for la in (a, b):
        la.optimize_prior_precision("glm", "marglik", 30, 0.2, 3.0, prior_structure)
    close(a.prior_precision, b.prior_precision, rtol=1e-6)
    for la in (a, b):
        la.optimize_prior_precision(init_prior_prec=torch.linspace(0.5, 2, len(la.params)).double(), n_steps=3)
    close(a.prior_precision, b.prior_precision, rtol=1e-6)


@pytest.mark.parametrize("likelihood", LIKELIHOODS)
@pytest.mark.parametrize("structure", ["kron", "diag", "full"])
def test_what_is_passed_to_the_evidence_is_kept(structure, likelihood):
    a, b, x = pair(likelihood, "all", structure)
    delta = [torch.tensor([2.0, 0.3, 1.0, 5.0], dtype=torch.float64, requires_grad=True) for _ in BOTH]
    sigma = [torch.tensor(0.4, dtype=torch.float64, requires_grad=True) for _ in BOTH]
    is_regression = likelihood == "regression"
    values = [
        la.log_marginal_likelihood(d, s if is_regression else None)
        for la, d, s in zip((a, b), delta, sigma, strict=True)
    ]
    close(*values)
    inputs = list(zip(delta, sigma, strict=True)) if is_regression else [(d,) for d in delta]
    gradients = [torch.autograd.grad(value, of) for value, of in zip(values, inputs, strict=True)]
    close(gradients[0][0], gradients[1][0])
    if (
        is_regression and structure != "kron"
    ):  # theirs leaves its log determinant out of the slope in σ, see test_numbers
        close(gradients[0][1], gradients[1][1])
    close(a.prior_precision, delta[0])
    f = [la(x) for la in (a, b)]
    close(f[0][1], f[1][1])


@pytest.mark.parametrize("temperature", [0.5, 3.0])
@pytest.mark.parametrize("likelihood", LIKELIHOODS)
def test_the_temperature_divides_the_loss_and_not_the_normaliser(likelihood, temperature):
    a, b, _ = pair(likelihood, "all", "diag", temperature=temperature)
    close(a.log_likelihood, b.log_likelihood)
    close(a.log_marginal_likelihood(), b.log_marginal_likelihood())
    close(a.posterior_variance, b.posterior_variance)


@pytest.mark.parametrize("backend", ["curvlinops.CurvlinopsEF", "backpack.BackPackEF", "asdl.AsdlEF"])
@pytest.mark.parametrize("likelihood", LIKELIHOODS)
@pytest.mark.parametrize("structure", ["diag", "full", "kron"])
def test_the_empirical_fisher_has_their_scale(structure, likelihood, backend):
    if "BackPack" in backend and structure == "kron":
        pytest.skip("theirs has none")
    a, b, _ = pair(likelihood, "all", structure, backend=backend)
    close(dense(a.H), dense(b.H))
    close(a.log_marginal_likelihood(), b.log_marginal_likelihood())


@pytest.mark.parametrize("structure", ["full", "diag"])
def test_subnetworks(structure):
    indices = torch.tensor([1, 4, 9, 22])
    a, b, x = pair("regression", "subnetwork", structure, subnetwork_indices=indices, prior_precision=0.4)
    close(a.H, b.H)
    close(a.log_marginal_likelihood(), b.log_marginal_likelihood())
    close(a(x)[1], b(x)[1])
    J = b.backend.jacobians(x)[0]
    close(a.functional_variance(J), b.functional_variance(J))
    close(a.backend.jacobians(x)[0], J)


def test_indices_of_a_subnetwork_keep_their_order():
    indices = torch.tensor([22, 1, 9, 4])
    a, b, x = pair("classification", "subnetwork", "full", subnetwork_indices=indices)
    close(a.H, b.H)
    delta = torch.tensor([0.5, 1.0, 2.0, 4.0], dtype=torch.float64)
    a.prior_precision, b._prior_precision, b._posterior_scale = delta, delta, None
    close(a.log_marginal_likelihood(), b.log_marginal_likelihood())
    close(a(x), b(x))
    J = torch.randn(2, 3, 4, dtype=torch.float64)
    close(a.functional_covariance(J), b.functional_covariance(J))


@pytest.mark.parametrize("structure", ["full", "kron", "diag"])
@pytest.mark.parametrize("direction", ["theirs to ours", "ours to theirs"])
def test_files_go_both_ways(direction, structure, tmp_path):
    a, b, x = pair("regression", "all", structure, prior_precision=0.6)
    source, target = (b, a) if direction == "theirs to ours" else (a, b)
    fresh_of = ours if target is a else theirs
    torch.save(source.state_dict(), tmp_path / "state.pt")
    fresh = fresh_of.Laplace(target.model, "regression", "all", structure)
    fresh.load_state_dict(torch.load(tmp_path / "state.pt"))
    close(fresh.log_marginal_likelihood(), source.log_marginal_likelihood())
    close(fresh(x)[1], source(x)[1])


@pytest.mark.parametrize("structure", ["full", "kron", "diag"])
def test_data_that_are_added_to_a_loaded_fit(structure, tmp_path):
    a, b, _ = pair("classification", "all", structure, cnn)
    more = data("classification", cnn, n=7)
    fresh = ours.Laplace(a.model, "classification", "all", structure)
    fresh.load_state_dict(copy.deepcopy(b.state_dict()))  # theirs changes its tensors in place
    for la in (a, b, fresh):
        la.fit(more, override=False)
        assert la.n_data == 18
    close(dense(a.H), dense(b.H))
    close(dense(fresh.H), dense(b.H))


@pytest.mark.parametrize(
    ("structure", "likelihood", "prior_structure"),
    [
        ("kron", "classification", "layerwise"),
        ("diag", "classification", "diag"),
        ("diag", "regression", "layerwise"),
        ("full", "regression", "scalar"),
    ],
)
def test_training_by_the_marginal_likelihood(structure, likelihood, prior_structure):
    found = []
    for library in BOTH:
        torch.manual_seed(0)
        model = mlp()
        ggn = module(library, "curvature.curvlinops").CurvlinopsGGN
        la, _, margliks, losses = library.marglik_training(
            model,
            data(likelihood),
            likelihood,
            structure,
            ggn,
            optimizer_kwargs={"lr": 0.02, "weight_decay": 0.1},
            n_epochs=12,
            n_epochs_burnin=3,
            marglik_frequency=2,
            prior_structure=prior_structure,
            temperature=0.8,
        )
        found.append([torch.tensor(margliks), torch.tensor(losses), la.prior_precision, la.sigma_noise, la.mean])
    for mine, their in zip(*found, strict=True):
        close(mine, their, rtol=1e-5)


def test_variance_along_sgd():
    variances = []
    for library in BOTH:
        torch.manual_seed(0)
        model, loader = mlp(), data("regression")
        swag = module(library, "utils.swag").fit_diagonal_swag_var
        variances.append(swag(model, loader, nn.MSELoss(), n_snapshots_total=6, snapshot_freq=2, lr=0.05))
    close(*variances, rtol=1e-6)


def test_a_grid_on_validation_data():
    """With a function of all predictions: their metrics go on from one point of the grid to the next."""
    a, b, _ = pair("classification", "all", "kron")
    losses = [[], []]
    for la, seen, library in zip((a, b), losses, BOTH, strict=True):
        get_nll = module(library, "utils").get_nll

        def loss(predictions, y, seen=seen, get_nll=get_nll):
            seen.append(get_nll(predictions, y))
            return seen[-1]

        la.optimize_prior_precision(method="gridsearch", val_loader=data("classification"), loss=loss, grid_size=7)
    close(torch.stack(losses[0]), torch.stack(losses[1]), rtol=1e-6)
    close(a.prior_precision, b.prior_precision)


def test_gradients_to_the_inputs():
    a, b, x = pair("regression", "all", "kron", enable_backprop=True, backend="backpack.BackPackGGN")
    gradients = []
    for la in (a, b):
        z = x.clone().requires_grad_()
        mean, covariance = la(z, joint=True)
        gradients.append(torch.autograd.grad(mean.sum() + covariance.square().sum(), z)[0])
    close(*gradients)
