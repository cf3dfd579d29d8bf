"""Programs for laplace-torch, as its documentation has them, that run with the import changed alone."""

from __future__ import annotations

import math
from collections.abc import MutableMapping

import pytest
import torch
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

from laplace_ws.compat.laplace_torch import BaseLaplace, Laplace, marglik_training
from laplace_ws.compat.laplace_torch.curvature.backpack import BackPackGGN
from laplace_ws.compat.laplace_torch.utils import LargestMagnitudeSubnetMask, ModuleNameSubnetMask
from laplace_ws.compat.laplace_torch.utils.enums import HessianStructure, Likelihood, PredType, SubsetOfWeights

pytestmark = pytest.mark.filterwarnings("ignore")


def sine(sigma=0.3, n=80):
    torch.manual_seed(711)
    x = torch.rand(n, 1) * 8
    return DataLoader(TensorDataset(x, x.sin() + sigma * torch.randn_like(x)), batch_size=40)


def network(n_inputs=1, n_outputs=1, n_hidden=30):
    torch.manual_seed(711)
    return nn.Sequential(nn.Linear(n_inputs, n_hidden), nn.Tanh(), nn.Linear(n_hidden, n_outputs))


def train(model, loader, loss, n_epochs=400):
    optimizer = torch.optim.Adam(model.parameters(), lr=1e-2)
    for _ in range(n_epochs):
        for x, y in loader:
            optimizer.zero_grad()
            loss(model(x), y).backward()
            optimizer.step()
    return model


def blobs(n=120, n_classes=3):
    torch.manual_seed(2)
    y = torch.arange(n) % n_classes
    angle = 2 * math.pi * y / n_classes
    x = torch.stack([angle.cos(), angle.sin()], 1) + 0.6 * torch.randn(n, 2)
    return DataLoader(TensorDataset(x, y), batch_size=40, shuffle=True)


def test_regression(tmp_path):
    """The noise is found by a loop over the evidence, which keeps what it is given; then a file, and both kinds of prediction."""
    loader = sine()
    model = train(network(), loader, nn.MSELoss())
    la = Laplace(model, "regression", subset_of_weights="all", hessian_structure="full")
    la.fit(loader)
    log_prior, log_sigma = torch.ones(1, requires_grad=True), torch.ones(1, requires_grad=True)
    hyper_optimizer = torch.optim.Adam([log_prior, log_sigma], lr=1e-1)
    for _ in range(200):
        hyper_optimizer.zero_grad()
        neg_marglik = -la.log_marginal_likelihood(log_prior.exp(), log_sigma.exp())
        neg_marglik.backward()
        hyper_optimizer.step()
    assert la.sigma_noise.item() == pytest.approx(0.3, abs=0.06)
    torch.save(la.state_dict(), tmp_path / "state_dict.bin")
    la = Laplace(model, "regression", subset_of_weights="all", hessian_structure="full")
    la.load_state_dict(torch.load(tmp_path / "state_dict.bin"))
    x_test = torch.linspace(-5, 13, 50)[:, None]
    f_mu, f_var = la(x_test)
    f_mu_joint, f_cov = la(x_test, joint=True)
    assert torch.allclose(f_mu.flatten(), f_mu_joint)
    assert torch.allclose(f_var.flatten(), f_cov.diag())
    far, near = f_var.flatten()[[0, -1]], f_var.flatten()[20:30]
    assert far.min() > 10 * near.max()


def test_online():
    loader = sine()
    la, _, margliks, losses = marglik_training(
        model=network(),
        train_loader=loader,
        likelihood="regression",
        hessian_structure="full",
        backend=BackPackGGN,
        n_epochs=120,
        optimizer_kwargs={"lr": 2e-2},
        prior_structure="scalar",
        n_epochs_burnin=20,
        marglik_frequency=5,
    )
    assert margliks[-1] < margliks[0]
    assert losses[-1] < losses[0]
    assert la.sigma_noise.item() == pytest.approx(0.3, abs=0.1)
    assert la(torch.zeros(3, 1))[1].shape == (3, 1, 1)
    assert la.prior_precision.numpy().shape == (1,)


def test_calibration():
    """The last layer's posterior makes an overfitted classifier less sure of itself, and better."""
    loader, test = blobs(), blobs(300)
    model = train(network(2, 3), loader, nn.CrossEntropyLoss())
    x, y = test.dataset.tensors
    la = Laplace(model, "classification", subset_of_weights="last_layer", hessian_structure="kron")
    la.fit(loader)
    la.optimize_prior_precision(method="marglik")
    with torch.no_grad():
        plain, bayesian = model(x).softmax(-1), la(x)
    assert bayesian.max(-1).values.mean() < plain.max(-1).values.mean()
    torch.testing.assert_close(bayesian.sum(-1), torch.ones(300))
    assert (bayesian.argmax(-1) == y).float().mean() > 0.7


def test_simple_usage():
    loader = blobs()
    model = train(network(2, 3), loader, nn.CrossEntropyLoss(), 50)
    la = Laplace(model, "classification", subset_of_weights="all", hessian_structure="diag")
    la.fit(loader)
    la.optimize_prior_precision(method="gridsearch", pred_type="glm", link_approx="probit", val_loader=blobs(60))
    x = torch.randn(5, 2)
    torch.testing.assert_close(la(x, pred_type="glm", link_approx="probit").sum(-1), torch.ones(5))


@pytest.mark.parametrize("hessian_structure", ["full", "diag"])
def test_subnetwork(hessian_structure):
    loader = blobs()
    model = train(network(2, 3), loader, nn.CrossEntropyLoss(), 50)
    mask = LargestMagnitudeSubnetMask(model, n_params_subnet=20)
    indices = mask.select()
    la = Laplace(
        model,
        "classification",
        subset_of_weights="subnetwork",
        hessian_structure=hessian_structure,
        subnetwork_indices=indices,
    )
    la.fit(loader)
    weights = torch.cat([p.detach().flatten() for p in model.parameters()])
    assert weights[indices].abs().min() >= weights.abs().kthvalue(len(weights) - 20).values
    torch.testing.assert_close(la(torch.randn(4, 2)).sum(-1), torch.ones(4))
    by_name = ModuleNameSubnetMask(model, module_names=["2"])
    assert by_name.select(loader).tolist() == list(range(len(weights) - 93, len(weights)))


class Reward(nn.Module):
    def __init__(self):
        super().__init__()
        self.net = nn.Sequential(nn.Linear(3, 30), nn.ReLU(), nn.Linear(30, 1))

    def forward(self, x):
        if x.ndim == 3:
            return self.net(x.reshape(-1, x.shape[-1])).reshape(len(x), 2)
        return self.net(x)


def test_reward_modelling():
    torch.manual_seed(0)
    pairs = torch.randn(60, 2, 3)
    labels = (pairs[:, 1, 0] > pairs[:, 0, 0]).long()  # the first coordinate is what is preferred
    loader = DataLoader(TensorDataset(pairs, labels), batch_size=20)
    model = train(Reward(), loader, nn.CrossEntropyLoss(), 30).eval()
    la = Laplace(model, likelihood="reward_modeling", subset_of_weights="all")
    la.fit(loader)
    la.optimize_prior_precision()
    x = torch.tensor([[-1.0, 0, 0], [0, 0, 0], [1, 0, 0]])
    mean, covariance = la(x)
    assert (mean.shape, covariance.shape) == ((3, 1), (3, 1, 1))
    assert mean.flatten().diff().min() > 0


@pytest.mark.parametrize("pred_type", [PredType.GLM, PredType.NN])
def test_expectations_under_the_posterior(pred_type):
    """Thompson sampling, and expected improvement by samples: both have slopes in the inputs."""
    torch.manual_seed(123)
    model = nn.Sequential(nn.Linear(2, 10), nn.GELU(), nn.Linear(10, 1))
    loader = DataLoader(TensorDataset(torch.randn(5, 2), torch.randn(5, 1)), batch_size=3)
    la = Laplace(
        model,
        Likelihood.REGRESSION,
        subset_of_weights=SubsetOfWeights.ALL,
        hessian_structure=HessianStructure.KRON,
        enable_backprop=True,
    )
    la.fit(loader)
    la.optimize_prior_precision(PredType.GLM)
    x = torch.randn(10, 2, requires_grad=True)
    f = la.functional_samples(x, pred_type=pred_type, n_samples=10)
    improvement = (f - 0.1).clamp(0.0).mean(0)
    (slope,) = torch.autograd.grad(improvement.sum(), x)
    assert improvement.shape == (10, 1)
    assert slope.abs().sum() > 0


def test_bayesian_optimisation():
    """BoTorch climbs expected improvement through the posterior's mean and covariance."""
    pytest.importorskip("botorch")
    from botorch.acquisition.analytic import ExpectedImprovement
    from botorch.models.model import Model
    from botorch.optim.optimize import optimize_acqf
    from botorch.posteriors.gpytorch import GPyTorchPosterior
    from gpytorch.distributions import MultivariateNormal

    class Surrogate(Model):
        def __init__(self, la: BaseLaplace):
            super().__init__()
            self.la = la

        @property
        def num_outputs(self):
            return 1

        def posterior(self, X, output_indices=None, observation_noise=False, posterior_transform=None, **kwargs):
            b, q, d = X.shape
            mean, covariance = self.la(X.reshape(b * q, d), joint=True)
            blocks = covariance.reshape(b, q, b, q).diagonal(dim1=0, dim2=2).permute(2, 0, 1)
            return GPyTorchPosterior(MultivariateNormal(mean.reshape(b, q), blocks + 1e-4 * torch.eye(q)))

    torch.set_default_dtype(torch.float64)
    try:
        torch.manual_seed(0)
        x = torch.rand(20, 2) * 4 - 2
        y = (x - torch.tensor([0.5, -0.5])).square().sum(1, keepdim=True)
        loader = DataLoader(TensorDataset(x, y), batch_size=20)
        model = train(network(2, 1), loader, nn.MSELoss(), 300)
        la = Laplace(model, "regression", subset_of_weights="all", hessian_structure="kron", enable_backprop=True)
        la.fit(loader)
        la.optimize_prior_precision(n_steps=50)
        acquisition = ExpectedImprovement(Surrogate(la), best_f=y.min(), maximize=False)
        bounds = torch.tensor([[-2.0, -2.0], [2.0, 2.0]])
        start = torch.rand(5, 1, 2) * 4 - 2
        found, value = optimize_acqf(acquisition, bounds, q=1, num_restarts=4, raw_samples=16)
        assert value >= acquisition(start).max() - 1e-9
        assert (bounds[0] <= found).all()
        assert (found <= bounds[1]).all()
    finally:
        torch.set_default_dtype(torch.float32)


class Gpt2(nn.Module):
    """A small GPT-2 with random weights; the label of a text is read off its last token."""

    def __init__(self):
        super().__init__()
        transformers = pytest.importorskip("transformers")
        torch.manual_seed(0)
        config = transformers.GPT2Config(
            vocab_size=50, n_positions=16, n_embd=8, n_layer=1, n_head=2, num_labels=2, pad_token_id=0
        )
        self.hf_model = transformers.GPT2ForSequenceClassification(config)

    def forward(self, data: MutableMapping):
        device = next(self.parameters()).device
        ids, mask = data["input_ids"].to(device), data["attention_mask"].to(device)
        return self.hf_model(input_ids=ids, attention_mask=mask).logits


def texts():
    """One batch of tokens, padded, as Hugging Face's collators give it."""
    encoding = pytest.importorskip("transformers").BatchEncoding
    generator = torch.Generator().manual_seed(0)
    ids, lengths = torch.randint(1, 50, (6, 7), generator=generator), torch.tensor([7, 4, 5, 7, 3, 6])
    mask = (torch.arange(7) < lengths[:, None]).long()
    batch = {"input_ids": ids * mask, "attention_mask": mask, "labels": torch.arange(6) % 2}

    class Loader(list):
        dataset = range(6)

    return Loader([encoding(batch)])


def test_hugging_face_last_layer():
    model, loader = Gpt2().eval(), texts()
    la = Laplace(
        model,
        likelihood="classification",
        subset_of_weights="last_layer",
        hessian_structure="full",
        feature_reduction="pick_last",
    )
    la.fit(loader)
    la.optimize_prior_precision()
    batch = next(iter(loader))
    torch.testing.assert_close(la(batch).sum(-1), torch.ones(6))
    hidden = model.hf_model.transformer(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"])[0]
    features = hidden[torch.arange(6), batch["attention_mask"].sum(1) - 1].detach()
    p = model(batch).softmax(-1).detach()
    root = torch.diag_embed(p) - p[:, :, None] * p[:, None]
    truth = torch.einsum("nij,na,nb->iajb", root, features, features).reshape(16, 16)
    torch.testing.assert_close(la.H, truth, rtol=1e-4, atol=1e-6)


def test_hugging_face_with_a_frozen_body():
    model, loader = Gpt2().eval(), texts()
    for p in model.hf_model.parameters():
        p.requires_grad = False
    for p in model.hf_model.score.parameters():
        p.requires_grad = True
    la = Laplace(model, likelihood="classification", subset_of_weights="all", hessian_structure="diag")
    la.fit(loader)
    la.optimize_prior_precision()
    assert la.n_params == 16
    torch.testing.assert_close(la(next(iter(loader))).sum(-1), torch.ones(6))


@pytest.mark.parametrize("hessian_structure", ["kron", "diag"])
def test_low_rank_adapters(hessian_structure):
    peft = pytest.importorskip("peft")
    config = peft.LoraConfig(r=2, lora_alpha=4, target_modules=["c_attn"], lora_dropout=0.1, bias="none")
    model = peft.get_peft_model(Gpt2(), config).eval()
    with torch.no_grad():
        for name, p in model.named_parameters():
            if "lora_B" in name:  # zeros at first, at which the other factor has no curvature
                p.normal_(std=0.1)
    loader = texts()
    la = Laplace(model, likelihood="classification", subset_of_weights="all", hessian_structure=hessian_structure)
    la.fit(loader)
    batch = next(iter(loader))
    assert la.n_params == sum(p.numel() for name, p in model.named_parameters() if "lora" in name)
    torch.testing.assert_close(la(batch).sum(-1), torch.ones(6))
    torch.testing.assert_close(la(batch, pred_type="nn", link_approx="mc", n_samples=3).sum(-1), torch.ones(6))
