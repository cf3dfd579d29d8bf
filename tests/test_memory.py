"""What takes more memory than is free is refused in a sentence, before any work."""

import pytest
import torch
from torch import nn

from laplace_ws import Laplace, memory
from laplace_ws.errors import NotEnoughMemoryError
from laplace_ws.posterior import functional


def test_free_memory_is_less_than_a_tensor_can_be_and_more_than_nothing():
    free = memory.free_memory(torch.device("cpu"))
    assert free is None or 2**24 < free < 2**60


@pytest.mark.parametrize("call", ["fit", "check"])
def test_a_full_matrix_of_a_large_network_is_refused(call):
    model, x, y = nn.Linear(40_000, 500), torch.zeros(2, 40_000), torch.zeros(2, dtype=torch.long)
    la = Laplace(model, "classification", hessian_structure="full")
    with pytest.raises(
        NotEnoughMemoryError, match=r"a full matrix over 20,000,500 weights takes 2,911 TiB of memory, and .* are free"
    ):
        la.fit([(x, y)]) if call == "fit" else la.check(x)


def test_kronecker_factors_are_refused_with_the_largest_named(monkeypatch):
    monkeypatch.setattr(memory, "free_memory", lambda device: 3 * 2**20)
    model = nn.Sequential(nn.Linear(30, 700), nn.Tanh(), nn.Linear(700, 3))
    sentence = (
        r"a pair of Kronecker factors for each of 2 weights, 3\.7 MiB of it for '0\.weight' \(700, 30\), takes 7\.5 MiB of memory, and "
        r'3\.0 MiB are free on cpu; choose hessian_structure="diag"'
    )
    with pytest.raises(NotEnoughMemoryError, match=sentence):
        Laplace(model, "classification").fit([(torch.zeros(2, 30), torch.zeros(2, dtype=torch.long))])
    la = Laplace(model, "classification", hessian_structure="diag")
    la.fit([(torch.zeros(2, 30), torch.zeros(2, dtype=torch.long))])


def test_numbers_of_bytes_in_words():
    assert [memory.in_words(n) for n in (2**19, 3 * 2**20, 25 * 2**30, 2**50)] == [
        "0.5 MiB",
        "3.0 MiB",
        "25 GiB",
        "1,024 TiB",
    ]


# ------------------------------------------------------------------ predictions and samples

MIB = 2**20


def _fitted(structure="kron", model=None, n_outputs=10, n_terms=None, **options):
    torch.manual_seed(0)
    model = model or nn.Sequential(nn.Linear(3, 8), nn.Tanh(), nn.Linear(8, n_outputs))
    x = torch.randn(4, 3) if n_terms is None else torch.randn(4, n_terms, 3)
    la = Laplace(model, "classification", hessian_structure=structure, curvature="ggn_mc", **options)
    return la.fit([(x, torch.randint(0, n_outputs, x.shape[:-1]))])


@pytest.fixture
def little_memory(monkeypatch):
    """32 MiB are free, and nothing is computed."""

    def refuse(*_, **__):
        raise AssertionError("the work began before the memory was looked at")

    def set_up(la, mebibytes=32):
        monkeypatch.setattr(memory, "free_memory", lambda device: mebibytes * MIB)
        monkeypatch.setattr(functional.LinearisedModel, "_with_linearisation", refuse)
        monkeypatch.setattr(type(la.network), "outputs", refuse)
        monkeypatch.setattr(type(la.H), "inv_sqrt", refuse)
        return la

    return set_up


FREE = "of memory, and 32 MiB are free on cpu;"
FEWER = "or give fewer inputs at a time."
CALLS = {
    "joint": (
        {},
        lambda la: la.functional_moments(torch.zeros(300, 3), joint=True),
        f"a joint covariance [3,000, 3,000] of 300 inputs with 10 outputs each takes 69 MiB {FREE} leave out "
        "joint=True, " + FEWER,
    ),
    "by example": (
        {"n_outputs": 1000, "max_factor_dim": 64},
        lambda la: la.functional_moments(torch.zeros(10, 3)),
        f"a covariance [1,000, 1,000] of outputs for each of 10 inputs takes 76 MiB {FREE} choose "
        'diagonal_output=True for variances alone, or for classes link_approx="probit", which needs no more, ' + FEWER,
    ),
    "bridge": (
        {"n_outputs": 1000, "max_factor_dim": 64},
        lambda la: la(torch.zeros(10, 3), link_approx="bridge"),
        f"a covariance [1,000, 1,000] of outputs for each of 10 inputs takes 76 MiB {FREE} choose "
        'diagonal_output=True for variances alone, or for classes link_approx="probit", which needs no more, ' + FEWER,
    ),
    "by position, of other sequences than in the fit": (
        {"n_outputs": 300, "n_terms": 2, "max_factor_dim": 64},
        lambda la: la.functional_moments(torch.zeros(5, 20, 3)),
        f"a covariance [300, 300] of outputs for each of 100 positions takes 69 MiB {FREE} choose "
        'diagonal_output=True for variances alone, or for classes link_approx="probit", which needs no more, ' + FEWER,
    ),
    "draws by a covariance": (
        {"n_outputs": 1000, "max_factor_dim": 64},
        lambda la: la(torch.zeros(2, 3), link_approx="mc", backprop=True),
        f"a covariance [1,000, 1,000] of outputs for each of 2 inputs takes 46 MiB {FREE} choose "
        'diagonal_output=True for variances alone, or for classes link_approx="probit", which needs no more, ' + FEWER,
    ),
    "jacobians": (
        {},
        lambda la: la.jacobians(torch.zeros(4000, 3)),
        f"a Jacobian [10, 122] for each of 4,000 inputs takes 37 MiB {FREE} do without it by "
        "functional_moments, which never forms it, " + FEWER,
    ),
    "samples of weights": (
        {},
        lambda la: la.sample(100_000),
        f"a draw of 100,000 samples of 122 weights takes 93 MiB {FREE} draw fewer at a time.",
    ),
    "samples of outputs": (
        {},
        lambda la: la.functional_samples(torch.zeros(10, 3), n_samples=100_000),
        f"a draw of 100,000 samples of outputs [10, 10] takes 76 MiB {FREE} take a smaller n_samples, " + FEWER,
    ),
    "sampled networks": (
        {},
        lambda la: la(torch.zeros(1000, 3), pred_type="nn", n_samples=1000),
        f"a draw of 1,000 samples of outputs [1,000, 10] takes 76 MiB {FREE} take a smaller n_samples, " + FEWER,
    ),
    "draws of variances": (
        {"n_outputs": 1000, "max_factor_dim": 64},
        lambda la: la(torch.zeros(50, 3), link_approx="mc", diagonal_output=True),
        f"a draw of 100 samples of outputs [50, 1,000] takes 38 MiB {FREE} take a smaller n_samples, " + FEWER,
    ),
}


@pytest.mark.filterwarnings("ignore::laplace_ws.errors.CurvatureWarning")
@pytest.mark.parametrize("call", CALLS)
def test_predictions_say_what_they_would_take(call, little_memory):
    options, predict, sentence = CALLS[call]
    la = little_memory(_fitted(**options))
    with pytest.raises(NotEnoughMemoryError) as raised:
        predict(la)
    assert str(raised.value) == sentence


def test_a_full_matrix_says_what_its_prediction_takes(little_memory):
    la = _fitted("full", nn.Sequential(nn.Linear(3, 200), nn.Tanh(), nn.Linear(200, 5)), 5)
    la(torch.zeros(2, 3))  # its Cholesky factor is there
    little_memory(la)
    with pytest.raises(NotEnoughMemoryError) as raised:
        la.functional_moments(torch.zeros(500, 3), joint=True)
    assert str(raised.value).startswith("a joint covariance [2,500, 2,500]")
    with pytest.raises(NotEnoughMemoryError) as raised:
        la.functional_moments(torch.zeros(300, 3), joint=True)
    assert str(raised.value) == (
        f"a prediction by a full matrix, which needs 1,500 rows of a Jacobian over 1,805 weights at once, takes 52 MiB {FREE} "
        'choose hessian_structure="kron" or "diag", fewer weights by subset_of_weights, or give fewer inputs at a time.'
    )
    la.prior_precision = 2.0
    with pytest.raises(NotEnoughMemoryError) as raised:
        la(torch.zeros(2, 3))
    assert str(raised.value) == (
        f"the Cholesky factor of a full matrix over 1,805 weights takes 75 MiB {FREE} choose "
        'hessian_structure="kron", "diag" or "lowrank", or fewer weights by subset_of_weights.'
    )


def test_rows_of_a_full_matrix_keep_to_the_memory_budget(monkeypatch):
    la = _fitted("full")
    x = torch.randn(50, 3)
    whole = la.functional_moments(x)
    la.memory_budget = 10 * la.n_params * 20 * 8
    sizes, part = [], functional.LinearisedModel._part
    monkeypatch.setattr(
        functional.LinearisedModel, "_part", lambda self, x, *rest: (sizes.append(len(x)), part(self, x, *rest))[1]
    )
    for found, truth in zip(la.functional_moments(x), whole, strict=True):
        torch.testing.assert_close(found, truth)
    assert 1 < max(sizes) <= 8


def test_the_default_budget_grows_with_the_covered_weights():
    model = nn.Sequential(nn.Linear(3000, 3000), nn.Linear(3000, 2))
    n_bytes = 4 * sum(p.numel() for p in model.parameters())
    assert Laplace(model, "classification").memory_budget == 8 * n_bytes > 2**28
    assert Laplace(model, "classification", "last_layer").memory_budget == 2**28
    assert Laplace(model, "classification", memory_budget=5).memory_budget == 5


@pytest.mark.filterwarnings("ignore::laplace_ws.errors.CurvatureWarning")
def test_what_fits_is_predicted(monkeypatch):
    la = _fitted(n_outputs=1000, max_factor_dim=64)
    monkeypatch.setattr(memory, "free_memory", lambda device: 32 * MIB)
    x = torch.zeros(100, 3)
    assert la(x).shape == (100, 1000)
    assert la.functional_moments(x, diagonal_output=True)[1].shape == (100, 1000)
    assert la(x[:10], link_approx="mc", diagonal_output=True).shape == (10, 1000)
