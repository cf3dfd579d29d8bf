"""What laplace-torch's calls give, against dense algebra in float64: where its meaning differs from ours, it is its meaning."""

import math

import pytest
import torch
from torch import nn
from torch.distributions import MultivariateNormal
from torch.utils.data import DataLoader, TensorDataset

import laplace_ws
from laplace_ws.compat.laplace_torch import Laplace, LowRankLaplace, marglik_training
from laplace_ws.compat.laplace_torch.curvature import (
    AsdlGGN,
    BackPackGGN,
    CurvlinopsEF,
    CurvlinopsGGN,
    CurvlinopsHessian,
)
from laplace_ws.compat.laplace_torch.utils import Kron, KronDecomposed, RunningNLLMetric
from laplace_ws.curvature import exact

close = torch.testing.assert_close
KEYS = [(subset, structure) for subset in ("all", "last_layer") for structure in ("full", "kron", "diag")]


def mlp(n_outputs=2):
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, n_outputs)).double()


def loader(likelihood, n=9):
    torch.manual_seed(1)
    x = torch.randn(n, 3, dtype=torch.float64)
    y = torch.arange(n) % 2 if likelihood == "classification" else torch.randn(n, 2, dtype=torch.float64)
    return DataLoader(TensorDataset(x, y), batch_size=4)


def fitted(likelihood="classification", subset="all", structure="full", **options):
    data = loader(likelihood)
    la = Laplace(mlp(), likelihood, subset, structure, **options)
    la.fit(data)
    return la, *data.dataset.tensors


def precision(la):
    """P in full, from our own dense curvature."""
    H = la.posterior.H.to_dense() / (la.sigma_noise**2 * la.temperature)
    return H + torch.diag(la.prior_precision_diag)


@pytest.mark.parametrize("key", KEYS, ids="-".join)
def test_the_parts_of_a_posterior(key):
    la, x, _ = fitted("regression", *key, sigma_noise=0.6, prior_precision=0.8, prior_mean=0.1, temperature=2.0)
    P = precision(la)
    covered = la.posterior.n_params
    assert (la.n_params, la.n_layers) == (covered, len(la.posterior.parameter_names))
    found = la.posterior_precision
    dense = found.to_matrix() if isinstance(found, KronDecomposed) else found if found.ndim == 2 else torch.diag(found)
    close(dense, P)
    gaussian = MultivariateNormal(la.mean, precision_matrix=P)
    theta = la.mean + torch.randn(covered, dtype=torch.float64)
    close(la.log_prob(theta), gaussian.log_prob(theta))
    close(la.square_norm(theta), (theta - la.mean) @ P @ (theta - la.mean))
    close(la.scatter, 0.8 * (la.mean - 0.1).square().sum())
    close(la.log_det_ratio, P.logdet() - covered * math.log(0.8))
    if key[1] == "full":
        close(la.posterior_covariance, P.inverse())
        close(la.posterior_scale @ la.posterior_scale.mT, P.inverse())
    if key[1] == "diag":
        close(la.posterior_variance, 1 / P.diagonal())
    if key[0] == "all":
        J = exact.jacobian(la.model, x)
        close(la.functional_variance(J), J @ P.inverse() @ J.mT)
        close(la(x)[1], J @ P.inverse() @ J.mT)


def test_before_a_fit_the_posterior_is_the_prior():
    la = Laplace(mlp(), "classification", "all", "kron", prior_precision=0.5)
    theta = torch.randn(la.n_params, dtype=torch.float64)
    close(la.log_prob(theta), torch.distributions.Normal(0.0, 0.5**-0.5).log_prob(theta).sum())
    assert la.mean == 0
    assert isinstance(la.H, Kron)
    with pytest.raises(AttributeError, match="call fit"):
        _ = la.posterior_precision


def test_the_temperature_is_off_the_normaliser():
    la, x, y = fitted("regression", sigma_noise=0.6, temperature=3.0)
    f = la.model(x).detach()
    loss = 0.5 * (f - y).square().sum()
    close(la.loss, loss)
    close(la.log_likelihood, -loss / 0.36 / 3 - y.numel() * math.log(0.6 * math.sqrt(2 * math.pi)))
    close(la.log_marginal_likelihood(), la.log_likelihood - 0.5 * (la.log_det_ratio + la.scatter))
    ours = la.posterior.log_marginal_likelihood()
    normaliser = y.numel() * math.log(0.6 * math.sqrt(2 * math.pi))
    close(la.log_marginal_likelihood(), ours - normaliser * (1 - 1 / 3))


def test_layerwise_is_one_prior_precision_for_each_parameter_tensor():
    la, _, _ = fitted(structure="kron")
    la.optimize_prior_precision(prior_structure="layerwise", n_steps=2000)
    assert la.prior_precision.shape == (4,)
    close(la.prior_precision, la.posterior.optimal_prior_precision("parameter").clamp(1e-6, 1e8), rtol=2e-2, atol=0)
    assert la.posterior.optimal_prior_precision("layerwise").unique().shape == (2,)
    assert la.posterior.optimal_prior_precision("parameter").unique().shape == (4,)


def test_what_is_passed_to_the_evidence_is_kept_with_its_graph():
    la, x, _ = fitted("regression")
    log_delta, log_sigma = (torch.zeros(1, dtype=torch.float64, requires_grad=True) for _ in range(2))
    value = la.log_marginal_likelihood((log_delta + 1).exp(), (log_sigma - 1).exp())
    assert la.prior_precision.item() == pytest.approx(math.e)
    assert la.sigma_noise.item() == pytest.approx(1 / math.e)
    value.backward()
    assert log_delta.grad != 0
    assert log_sigma.grad != 0
    assert not la(x)[1].requires_grad
    assert la.log_marginal_likelihood() == value


@pytest.mark.parametrize("structure", ["kron", "diag", "full"])
def test_slopes_of_the_evidence_are_those_of_its_value(structure):
    """In σ too, where laplace-torch leaves the log determinant of "kron" out."""
    la, _, _ = fitted("regression", structure=structure)

    def value(delta, sigma):
        return la.log_marginal_likelihood(delta, sigma)

    at = [torch.tensor([v], dtype=torch.float64, requires_grad=True) for v in (0.7, 0.5)]
    assert torch.autograd.gradcheck(value, at)


def test_indices_of_a_subnetwork_keep_their_order():
    indices = torch.tensor([22, 1, 9, 4])
    la, x, y = fitted(subset="subnetwork", subnetwork_indices=indices)
    H = exact.ggn(la.model, "classification", x, y)
    close(la.H, H[indices][:, indices])
    delta = torch.tensor([0.5, 1.0, 2.0, 4.0], dtype=torch.float64)
    la.prior_precision = delta
    P = la.H + torch.diag(delta)
    close(la.posterior_precision, P)
    close(la.log_det_posterior_precision, P.logdet())
    J = torch.randn(2, 3, 4, dtype=torch.float64)
    close(la.functional_variance(J), J @ P.inverse() @ J.mT)
    close(la.functional_covariance(J), J.flatten(0, 1) @ P.inverse() @ J.flatten(0, 1).mT)
    samples = la.sample(20000, torch.Generator().manual_seed(0))
    close(samples[:, indices].T.cov(), P.inverse(), rtol=0.1, atol=0.02)
    rest = torch.ones(la.n_params, dtype=torch.bool).index_fill(0, indices, False)
    close(samples[:, rest], la.mean[rest].expand(20000, -1))
    la.optimize_prior_precision(init_prior_prec=delta, n_steps=1, lr=1e-12)
    close(la.prior_precision, delta)


def test_the_empirical_fisher_of_the_squared_error():
    la, x, y = fitted("regression", structure="full", backend=CurvlinopsEF, sigma_noise=0.5)
    ours = exact.empirical_fisher(la.model, "regression", x, y)
    close(la.H, 2 * ours)
    close(la.posterior_precision, 2 * ours / 0.25 + torch.eye(la.n_params, dtype=torch.float64))
    close(la.log_det_posterior_precision, la.posterior_precision.logdet())
    close(la(x)[1], la.functional_variance(exact.jacobian(la.model, x)))


@pytest.mark.parametrize("backend", [CurvlinopsGGN, AsdlGGN, BackPackGGN])
def test_gradients_to_the_inputs_of_every_backend(backend):
    la, x, _ = fitted("regression", structure="kron", backend=backend, enable_backprop=True)
    z = x[:2].clone().requires_grad_()
    assert torch.autograd.gradcheck(lambda z: la(z), (z,))
    assert la(z, "nn", link_approx="mc", n_samples=2)[1].requires_grad


@pytest.mark.parametrize("loss", [None, RunningNLLMetric()])
@pytest.mark.parametrize(("pred_type", "link"), [("glm", "probit"), ("glm", "bridge"), ("nn", "mc")])
def test_a_grid_scores_each_point_by_itself(pred_type, link, loss):
    la, _, _ = fitted(structure="kron")
    validation = loader("classification", 30)
    x, y = validation.dataset.tensors
    torch.manual_seed(3)
    options = {"pred_type": pred_type, "link_approx": link, "n_samples": 3}
    la.optimize_prior_precision(method="gridsearch", val_loader=[(x, y)], grid_size=6, loss=loss, **options)
    chosen = la.prior_precision.clone()
    torch.manual_seed(3)
    scores = []
    for delta in torch.logspace(-4, 4, 6):
        la.prior_precision = delta
        scores.append(nn.functional.nll_loss(la(x, **options).log(), y).item())
    assert chosen == torch.logspace(-4, 4, 6)[scores.index(min(scores))]  # in float32, as theirs


def test_a_grid_for_regression_sees_means_and_covariances():
    la, _, _ = fitted("regression", structure="full")
    x, y = loader("regression", 20).dataset.tensors

    def loss(mean, covariance, targets):
        assert covariance.shape == (20, 2, 2)
        return MultivariateNormal(mean, covariance + 0.1 * torch.eye(2)).log_prob(targets).mean().neg()

    torch.set_default_dtype(torch.float64)
    try:
        la.optimize_prior_precision("glm", "gridsearch", val_loader=[(x, y)], loss=loss, grid_size=9)
    finally:
        torch.set_default_dtype(torch.float32)
    at_chosen = loss(*la(x), y)
    la.prior_precision = la.prior_precision * 10
    assert at_chosen <= loss(*la(x), y)


def test_the_default_loss_of_regression_says_nothing_of_the_prior():
    """The mean of the linearised network is the network's: all points are equal, and the first is taken."""
    la, x, y = fitted("regression", structure="full")
    la.optimize_prior_precision(method="gridsearch", val_loader=[(x, y)], grid_size=5)
    assert la.prior_precision.item() == pytest.approx(1e-4)


def test_training_returns_what_laplace_torch_returns():
    torch.manual_seed(0)
    model = mlp()
    model.insert(1, nn.Dropout(0.1))
    model.train()
    la, trained, margliks, losses = marglik_training(
        model, loader("regression"), "regression", "diag", n_epochs=6, marglik_frequency=2, n_hypersteps=3
    )
    assert trained is model
    assert (len(margliks), len(losses)) == (9, 6)
    assert la.prior_precision.shape == (4,)
    la.log_marginal_likelihood()
    assert isinstance(la.posterior, laplace_ws.Laplace)


@pytest.mark.parametrize("structure", ["full", "kron", "diag"])
def test_data_are_added_whatever_the_weights_were(structure):
    la, _, _ = fitted(structure=structure)
    before = la.posterior.H
    with torch.no_grad():
        la.model[0].weight.add_(0.1)
    la.fit(loader("classification", 5), override=False)
    again = Laplace(la.model, "classification", "all", structure)
    again.fit(loader("classification", 5))
    close(la.posterior.H.to_dense(), (before + again.posterior.H).to_dense())
    assert la.n_data == 14
    close(la.mean, again.mean)


@pytest.mark.parametrize("key", KEYS, ids="-".join)
def test_a_state_is_plain_and_restores_all(key, tmp_path):
    la, x, _ = fitted("regression", *key, prior_precision=0.4)
    la.optimize_prior_precision(n_steps=3)
    la.sigma_noise = 0.3
    torch.save(la.state_dict(), tmp_path / "state.pt")
    other = Laplace(mlp(), "regression", *key)
    other.load_state_dict(torch.load(tmp_path / "state.pt"))
    close(other.log_marginal_likelihood(), la.log_marginal_likelihood())
    close(other(x)[1], la(x)[1])
    close(
        other.H_facs.to_matrix() if key[1] == "kron" else other.H, la.H_facs.to_matrix() if key[1] == "kron" else la.H
    )


def test_a_state_of_another_kind_is_refused():
    la, _, _ = fitted("regression", structure="diag")
    for other, what in (
        (Laplace(mlp(), "regression", "all", "full"), "class: DiagLaplace, and this one FullLaplace"),
        (Laplace(mlp(), "classification", "all", "diag"), "likelihood: regression, and this one classification"),
        (Laplace(mlp(3), "regression", "all", "diag"), "number of weights: 26, and this one 31"),
    ):
        with pytest.raises(ValueError, match=what):
            other.load_state_dict(la.state_dict())


def test_low_rank_is_the_leading_part_of_the_ggn():
    data = loader("classification")
    la = LowRankLaplace(mlp(), "classification", backend_kwargs={"low_rank": 26})
    la.fit(data)
    (vectors, values), delta = la.posterior_precision
    truth = exact.ggn(la.model, "classification", *data.dataset.tensors)
    close((vectors * values) @ vectors.mT, truth, rtol=1e-6, atol=1e-8)
    close(delta, torch.ones(26, dtype=torch.float64))


def test_rewards_from_comparisons():
    class Reward(nn.Module):
        def __init__(self):
            super().__init__()
            self.net = nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 1)).double()

        def forward(self, x):
            return self.net(x).flatten(1) if x.ndim == 3 else self.net(x)

    torch.manual_seed(0)
    pairs, y = torch.randn(9, 2, 3, dtype=torch.float64), torch.arange(9) % 2
    la = Laplace(Reward(), "reward_modeling", "all", "kron")
    la.fit(DataLoader(TensorDataset(pairs, y), batch_size=4))
    x = torch.randn(5, 3, dtype=torch.float64)
    close(la(x)[0], la.model(x).detach())
    close(la(x)[1], la.functional_variance(exact.jacobian(la.model, x)))
    preferred = la(pairs, fitting=True)
    close(preferred.sum(1), torch.ones(9, dtype=torch.float64))


def test_labels_of_minus_100_do_not_count():
    x, y = loader("classification").dataset.tensors
    y = y.clone()
    y[2:4] = -100
    la = Laplace(mlp(), "classification", "all", "full")
    la.fit(DataLoader(TensorDataset(x, y), batch_size=4))
    counted = y != -100
    close(la.H, exact.ggn(la.model, "classification", x[counted], y[counted]))
    close(la.loss, nn.functional.cross_entropy(la.model(x), y, reduction="sum").detach())


def test_a_network_that_has_changed_since_the_fit_does_not_predict():
    la, x, _ = fitted()
    assert not la.model.training
    with torch.no_grad():
        la.model[0].weight.mul_(2)
    with pytest.raises(ValueError, match="load_mean"):
        la(x)
    last, x, _ = fitted(subset="last_layer")
    assert last.model.model is not la.model


@pytest.mark.parametrize("subset", ["all", "last_layer"])
@pytest.mark.parametrize("backend", [CurvlinopsGGN, AsdlGGN, BackPackGGN])
def test_batches_that_are_mappings(backend, subset):
    class Net(nn.Module):
        def __init__(self):
            super().__init__()
            self.net = mlp()

        def forward(self, data):
            return self.net(data["features"])

    x, y = loader("classification").dataset.tensors
    rows = [{"features": a, "target": b} for a, b in zip(x, y, strict=True)]
    keys = {"dict_key_x": "features", "dict_key_y": "target"}
    la = Laplace(Net(), "classification", subset, "kron", backend=backend, **keys)
    la.fit(DataLoader(rows, batch_size=4))
    plain = Laplace(mlp(), "classification", subset, "kron", backend=backend)
    plain.fit(loader("classification"))
    close(la.log_marginal_likelihood(), plain.log_marginal_likelihood())
    close(la({"features": x}), plain(x))
    la.optimize_prior_precision(method="gridsearch", val_loader=DataLoader(rows, batch_size=4), grid_size=3)
    plain.optimize_prior_precision(method="gridsearch", val_loader=loader("classification"), grid_size=3)
    close(la.prior_precision, plain.prior_precision)


CALLS = [
    (lambda: Laplace(mlp(), "poisson"), ValueError, "'poisson' is not a valid Likelihood"),
    (lambda: Laplace(mlp(), "classification", "all", "gp"), NotImplementedError, "not offered here"),
    (lambda: Laplace(mlp(), "classification", "subnetwork", "kron"), ValueError, "choose one of \\['full', 'diag'\\]"),
    (lambda: Laplace(mlp(), "classification", sigma_noise=2.0), ValueError, "sigma_noise is for regression"),
    (lambda: Laplace(mlp(), "regression", "all", sigma_noise=torch.ones(2)), ValueError, "one number"),
    (lambda: Laplace(mlp(), "regression", "all", prior_precision="1"), ValueError, "must be a number or a tensor"),
    (lambda: Laplace(mlp(), "regression", "all", prior_precision=torch.ones(3)), ValueError, "lengths \\[1, 4\\]"),
    (lambda: Laplace(mlp(), "regression", "all", prior_mean=torch.ones(3)), ValueError, "one number or 26"),
    (lambda: fitted(backend=CurvlinopsHessian), ValueError, "has no posterior here"),
    (lambda: fitted(backend_kwargs={"stochastc": True}), TypeError, "no option 'stochastc'"),
    (lambda: fitted()[0](torch.zeros(2, 3).double(), "nn"), ValueError, 'give link_approx="mc"'),
    (lambda: fitted()[0](torch.zeros(2, 3).double(), "gp"), ValueError, "not offered here"),
    (lambda: fitted()[0](torch.zeros(2, 3).double(), k=1), TypeError, "bind k into its forward"),
    (lambda: fitted()[0](torch.zeros(2, 3).double(), generator=3), ValueError, "must be a torch.Generator"),
    (lambda: fitted()[0].optimize_prior_precision(method="gridsearch"), ValueError, "needs val_loader"),
    (lambda: fitted()[0].log_marginal_likelihood(None, torch.tensor(1.0)), ValueError, "is for regression"),
    (lambda: fitted(subset="last_layer", asdl_fisher_kwargs={}), ValueError, "leave it out"),
    (lambda: fitted(subset="last_layer", last_layer_name="1"), ValueError, "is a Tanh and must be nn.Linear"),
    (
        lambda: fitted(subset="subnetwork", subnetwork_indices=torch.tensor([1, 1])),
        ValueError,
        "distinct places, 0 to 25",
    ),
    (lambda: fitted()[0].functional_variance(torch.ones(2, 3)), ValueError, r"\[N, C, 26\]"),
]


@pytest.mark.parametrize(("call", "error", "sentence"), CALLS)
def test_what_is_refused_says_why(call, error, sentence):
    with pytest.raises(error, match=sentence):
        call()
