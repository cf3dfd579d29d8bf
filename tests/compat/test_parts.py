"""The parts of laplace-torch's module that are not posteriors: factors, features, masks, loaders, curvature of single batches."""

import pytest
import torch
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

from laplace_ws.compat.laplace_torch.curvature import (
    AsdfghjklGGN,
    AsdlEF,
    AsdlGGN,
    BackPackGGN,
    CurvatureInterface,
    CurvlinopsEF,
    CurvlinopsGGN,
    CurvlinopsHessian,
)
from laplace_ws.compat.laplace_torch.utils import (
    FeatureExtractor,
    Kron,
    KronDecomposed,
    LargestVarianceSWAGSubnetMask,
    LastLayerSubnetMask,
    ModuleNameSubnetMask,
    ParamNameSubnetMask,
    SubnetMask,
    expand_prior_precision,
    invsqrt_precision,
    normal_samples,
)
from laplace_ws.compat.laplace_torch.utils.data import MissingEntryError, on_device
from laplace_ws.compat.laplace_torch.utils.matrix import factors_of
from laplace_ws.curvature import exact, kron_factors
from laplace_ws.errors import InvalidBatchError

close = torch.testing.assert_close
SIZES = [[3, 2], [3], [2, 4], [2]]


def psd(n):
    root = torch.randn(n, n + 1, dtype=torch.float64)
    return root @ root.mT


def kron(diagonal=False):
    torch.manual_seed(0)
    return Kron([[psd(n).diagonal().clone() if diagonal else psd(n) for n in sizes] for sizes in SIZES])


def net():
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 2)).double()


def batch(likelihood="classification", n=6):
    torch.manual_seed(1)
    x = torch.randn(n, 3, dtype=torch.float64)
    return x, torch.arange(n) % 2 if likelihood == "classification" else torch.randn(n, 2, dtype=torch.float64)


# ------------------------------------------------------------------ Kronecker factors


@pytest.mark.parametrize("diagonal", [False, True])
def test_factors_are_a_block_diagonal_matrix(diagonal):
    matrix = kron(diagonal)
    dense = matrix.to_matrix()
    close(matrix.diag(), dense.diagonal())
    close(matrix.logdet(), dense.logdet())
    close((1.7 * matrix).to_matrix(), 1.7 * dense)
    for shape in ((19,), (4, 19), (2, 4, 19)):
        vectors = torch.randn(shape, dtype=torch.float64)
        close(matrix.bmm(vectors), vectors @ dense)
    close((matrix + matrix).kfacs[0][0], 2 * matrix.kfacs[0][0])


@pytest.mark.parametrize("diagonal", [False, True])
@pytest.mark.parametrize("delta", [torch.tensor(0.3), torch.tensor([0.1, 0.2, 0.3, 0.4])])
def test_decomposed_factors_have_powers(delta, diagonal):
    matrix = kron(diagonal)
    per_weight = delta.double().expand(4).repeat_interleave(torch.tensor([6, 3, 8, 2]))
    dense = 1.5 * matrix.to_matrix() + torch.diag(per_weight)
    found = matrix.decompose() * 1.5 + delta.double()
    values, vectors = torch.linalg.eigh(dense)
    for power in (1, -1, -0.5):
        truth = (vectors * values**power) @ vectors.mT
        close(found.to_matrix(power), truth)
        close(found.diag(power), truth.diagonal())
        for shape in ((19,), (4, 19), (2, 4, 19)):
            W = torch.randn(shape, dtype=torch.float64)
            close(found.bmm(W, power), W @ truth)
    W = torch.randn(2, 3, 19, dtype=torch.float64)
    close(found.inv_square_form(W), W @ dense.inverse() @ W.mT)
    close(found.logdet(), dense.logdet())


def test_damping_adds_the_root_to_each_of_two_factors():
    matrix = kron()
    found = matrix.decompose(damping=True)
    found.deltas = torch.full((4,), 0.25, dtype=torch.float64)
    blocks = []
    for F in matrix.kfacs:
        more = [factor + (0.5 if len(F) == 2 else 0.25) * torch.eye(len(factor)) for factor in F]
        blocks.append(more[0] if len(F) == 1 else torch.kron(*more))
    close(found.to_matrix(), torch.block_diag(*blocks))


@pytest.mark.parametrize(
    "layer", [nn.Linear(3, 2), nn.Conv1d(4, 4, 3, groups=2), nn.Embedding(5, 2)], ids=["linear", "groups", "embedding"]
)
def test_factors_of_ours_are_the_same_matrix(layer):
    class Net(nn.Module):
        def __init__(self):
            super().__init__()
            self.layer, self.head = layer.double(), nn.Linear(2 if not isinstance(layer, nn.Conv1d) else 12, 2).double()

        def forward(self, x):
            return self.head(self.layer(x).flatten(1))

    inputs = {nn.Linear: torch.randn(6, 3), nn.Conv1d: torch.randn(6, 4, 5), nn.Embedding: torch.arange(6) % 5}
    x = inputs[type(layer)]
    ours = kron_factors(
        Net(), "classification", [(x if not x.is_floating_point() else x.double(), torch.arange(6) % 2)]
    )
    close(Kron(factors_of(ours)).to_matrix(), ours.to_dense())


def test_what_does_not_fit_a_matrix_is_refused():
    matrix, decomposed = kron(), kron().decompose()
    for call in (
        lambda: matrix + 1.0,
        lambda: matrix * torch.ones(2),
        lambda: matrix.bmm(torch.ones(19).double(), exponent=-1),
        lambda: decomposed + torch.ones(3),
        lambda: KronDecomposed([[torch.eye(2)]], [[torch.ones(2)]], deltas=1.0),
    ):
        with pytest.raises(ValueError, match=r"add|multiplied|decompose|one number or"):
            call()


# ------------------------------------------------------------------ curvature of a batch


@pytest.mark.parametrize("kind", [CurvlinopsGGN, AsdlGGN, BackPackGGN, AsdfghjklGGN])
@pytest.mark.parametrize("likelihood", ["classification", "regression"])
def test_gauss_newton_of_a_batch(kind, likelihood):
    x, y = batch(likelihood)
    backend = kind(net(), likelihood)
    truth = exact.ggn(backend.model, likelihood, x, y)
    loss, H = backend.full(x, y)
    close(H, truth)
    close(loss, backend.factor * backend.lossfunc(backend.model(x), y).detach())
    close(backend.diag(x, y)[1], truth.diagonal())
    close(backend.kron(x[:1], y[:1], N=1)[1].diag(), backend.diag(x[:1], y[:1])[1])
    two = [backend.kron(x[part], y[part], N=6)[1] for part in (slice(0, 2), slice(2, 6))]
    close((two[0] + two[1]).to_matrix(), backend.kron(x, y, N=6)[1].to_matrix())


@pytest.mark.parametrize("kind", [CurvlinopsEF, AsdlEF])
@pytest.mark.parametrize("likelihood", ["classification", "regression"])
def test_empirical_fisher_of_a_batch(kind, likelihood):
    x, y = batch(likelihood)
    backend = kind(net(), likelihood)
    gradients, loss = backend.gradients(x, y)
    close(loss, backend.lossfunc(backend.model(x), y).detach())
    for n, row in enumerate(gradients):
        one = backend.lossfunc(backend.model(x[n : n + 1]), y[n : n + 1])
        close(row, torch.cat([g.flatten() for g in torch.autograd.grad(one, backend.params)]))
    close(backend.full(x, y)[1], backend.factor * gradients.mT @ gradients)


def test_hessian_of_a_batch():
    x, y = batch()
    backend = CurvlinopsHessian(net(), "classification")
    close(backend.full(x, y)[1], exact.hessian(backend.model, "classification", x, y))


def test_jacobians_of_a_batch_and_of_the_last_layer():
    x, _ = batch()
    model = net()
    close(CurvatureInterface(model, "classification").jacobians(x)[0], exact.jacobian(model, x))
    indices = torch.tensor([3, 5])
    close(
        CurvatureInterface(model, "classification", subnetwork_indices=indices).jacobians(x)[0],
        exact.jacobian(model, x)[..., indices],
    )
    extractor = FeatureExtractor(model)
    J, f = CurvatureInterface(extractor, "classification", last_layer=True).last_layer_jacobians(x)
    close(J, exact.jacobian(model, x)[..., 16:])
    close(f, model(x).detach())


# ------------------------------------------------------------------ features, masks, loaders


@pytest.mark.parametrize(("reduction", "of"), [("pick_first", 0), ("pick_last", -1), ("average", None), (None, None)])
def test_features_are_what_the_last_layer_is_given(reduction, of):
    model, x = net(), torch.randn(5, 7, 3, dtype=torch.float64)
    f, features = FeatureExtractor(model, feature_reduction=reduction).forward_with_features(x)
    whole = model[:2](x).detach()
    close(f, model(x))
    close(features, whole if reduction is None else whole.mean(1) if of is None else whole[:, of])


def test_the_last_layer_is_what_is_done_last():
    class Backwards(nn.Module):
        def __init__(self):
            super().__init__()
            self.head, self.body = nn.Linear(4, 2), nn.Linear(3, 4)

        def forward(self, x):
            return self.head(self.body(x))

    extractor = FeatureExtractor(Backwards())
    extractor(torch.randn(2, 3))
    assert extractor.last_layer is extractor.model.head
    with pytest.raises(ValueError, match="known"):
        extractor.find_last_layer(torch.randn(2, 3))
    with pytest.raises(ValueError, match="one module"):
        FeatureExtractor(nn.Linear(3, 2))(torch.randn(2, 3))


def test_masks_choose_weights():
    model, loader = net(), DataLoader(TensorDataset(*batch()), batch_size=3)
    last = list(range(16, 26))
    for mask, chosen in (
        (LastLayerSubnetMask(model), last),
        (LastLayerSubnetMask(model, "2"), last),
        (ModuleNameSubnetMask(model, ["2"]), last),
        (ParamNameSubnetMask(model, ["2.bias"]), last[-2:]),
    ):
        assert mask.select(loader).tolist() == chosen
        assert mask.n_params_subnet == len(chosen)
    swag = LargestVarianceSWAGSubnetMask(model, 5, swag_n_snapshots=3)
    assert len(swag.select(loader)) == 5


def test_masks_say_what_does_not_fit():
    model = net()

    class Wrong(SubnetMask):
        def get_subnet_mask(self, train_loader):
            return torch.ones(3, dtype=torch.bool)

    for call, sentence in (
        (lambda: Wrong(model).select(), "a vector of 26 zeros and ones"),
        (lambda: ModuleNameSubnetMask(model, ["1"]).select(), "must have parameters"),
        (lambda: ModuleNameSubnetMask(model, ["head"]).select(), "no module 'head'"),
        (lambda: ParamNameSubnetMask(model, []).select(), "one or more parameters"),
        (lambda: LastLayerSubnetMask(model).select(), "pass them to select"),
        (lambda: LargestVarianceSWAGSubnetMask(model, 99), "at most the 26"),
        (lambda: LargestVarianceSWAGSubnetMask(model, 3, "reward_modeling"), "classification and regression"),
    ):
        with pytest.raises(ValueError, match=sentence):
            call()


def test_a_batch_without_its_targets_is_named():
    loader = on_device([{"x": torch.ones(2)}], torch.device("cpu"), "labels")
    with pytest.raises(
        MissingEntryError, match=r"^a batch has no entry 'labels'; name that of the targets by dict_key_y\.$"
    ):
        list(loader)
    assert issubclass(MissingEntryError, InvalidBatchError)
    assert issubclass(MissingEntryError, KeyError)


def test_batches_are_moved_to_the_device_of_the_model():
    class Encoding(dict):
        def to(self, device):
            return Encoding({key: value.to(device) for key, value in self.items()})

    meta = torch.device("meta")
    batches = [
        (torch.ones(2, 3), torch.ones(2)),
        Encoding(input_ids=torch.ones(2), labels=torch.ones(2)),
        {"labels": torch.ones(2)},
    ]
    pair, encoding, mapping = on_device(batches, meta, "labels")
    assert all(part.device == meta for part in (*pair, *encoding.values(), *mapping.values()))
    assert type(encoding) is Encoding


def test_small_functions():
    M = psd(5)
    L = invsqrt_precision(M)
    close(L @ L.mT, M.inverse())
    close(L, L.tril())
    model = net()
    counts = [
        (expand_prior_precision(torch.tensor([1.0, 2.0, 3.0, 4.0]), model) == k).sum().item() for k in (1, 2, 3, 4)
    ]
    assert counts == [12, 4, 8, 2]
    mean, var = torch.randn(3, 2, dtype=torch.float64), torch.stack([psd(2) for _ in range(3)])
    samples = normal_samples(mean, var, 20000, torch.Generator().manual_seed(0))
    close(samples.mean(0), mean, rtol=0, atol=0.05)
    close(torch.stack([samples[:, n].T.cov() for n in range(3)]), var, rtol=0.05, atol=0.1)
