"""Several threads: what each computes is what it would compute alone, and models and settings are left as they were found."""

from __future__ import annotations

import sys
import threading
import warnings

import pytest
import torch
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

from laplace_ws import Laplace, marglik_training

BACKENDS = ["native", "asdl", "backpack"]
SECONDS = 60  # after which threads that wait for each other are taken to wait for ever


@pytest.fixture(autouse=True)
def _many_switches():
    """Threads take turns after microseconds."""
    before = sys.getswitchinterval()
    sys.setswitchinterval(1e-6)
    yield
    sys.setswitchinterval(before)


def at_once(*functions):
    """What functions return, each in a thread of its own; errors are raised."""
    start, found, errors = threading.Barrier(len(functions)), [None] * len(functions), []

    def run(place, function):
        try:
            start.wait()
            found[place] = function()
        except Exception as error:
            errors.append(error)

    threads = [
        threading.Thread(target=run, args=(place, function), daemon=True) for place, function in enumerate(functions)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(SECONDS)
    if errors:
        raise errors[0]
    assert not any(thread.is_alive() for thread in threads), "a thread waits for ever"
    return found


def net(seed: int) -> nn.Sequential:
    torch.manual_seed(seed)
    return nn.Sequential(
        nn.Linear(5, 8 + seed), nn.BatchNorm1d(8 + seed), nn.Tanh(), nn.Dropout(), nn.Linear(8 + seed, 3)
    )


def batches(seed: int = 0) -> list:
    generator = torch.Generator().manual_seed(seed)
    return [
        (torch.randn(12, 5, generator=generator), torch.randint(0, 3, (12,), generator=generator)) for _ in range(3)
    ]


def numbers(model: nn.Module, backend: str, subset: str = "all", structure: str = "kron") -> torch.Tensor:
    """All that a fit finds, with sampled labels, and predictions from it."""
    la = Laplace(
        model,
        "classification",
        subset,
        structure,
        backend=backend,
        curvature="ggn_mc",
        generator=torch.Generator().manual_seed(1),
    )
    la.fit(batches())
    x = batches(1)[0][0]
    glm, nn_ = la(x), la(x, pred_type="nn", n_samples=3, generator=torch.Generator().manual_seed(2))
    evidence = la.log_marginal_likelihood()
    parts = [la.H.to_dense(), glm, nn_, evidence] if structure != "lowrank" else [la.H.values, nn_, evidence]
    return torch.cat([part.detach().flatten().double() for part in parts])


def as_found(*models: nn.Module) -> list:
    """Modes, hooks, flags and tensors of models, and settings of the process."""
    of_models = [
        (
            [(module.training, module._is_full_backward_hook) for module in model.modules()],
            [{name: list(hooks) for name, hooks in vars(module).items() if name.endswith("_hooks")} for module in model.modules()],
            [(p.requires_grad, p.grad is None, sorted(vars(p))) for p in model.parameters()],
            {name: value.tolist() for name, value in model.state_dict().items()},
        )
        for model in models
    ]  # fmt: skip
    cuda = torch.backends.cuda
    settings = [
        list(warnings.filters),
        nn.Module.__call__,
        nn.Module.__getattr__,
        torch.arange,
        torch.autograd.Function.__dict__["apply"],
        torch.autocast.__init__,
        torch.get_rng_state().tolist(),
        torch.backends.cudnn.enabled,
        cuda.matmul.fp32_precision,
        [cuda.flash_sdp_enabled(), cuda.mem_efficient_sdp_enabled(), cuda.math_sdp_enabled(), cuda.cudnn_sdp_enabled()],
    ]
    return [of_models, settings]


# ------------------------------------------------------------------ fits and predictions


@pytest.mark.parametrize("backend", BACKENDS)
def test_two_threads_that_fit_two_models(backend, attacks):
    models = [net(1), net(2)]
    alone, before = [numbers(model, backend) for model in models], as_found(*models)
    for _ in range(attacks(50)):
        found = at_once(*(lambda model=model: numbers(model, backend) for model in models))
        assert all(map(torch.equal, found, alone))
        assert as_found(*models) == before


@pytest.mark.parametrize("backend", BACKENDS)
def test_two_threads_that_fit_one_model(backend, attacks):
    """One of them covers the last layer alone, so that the model's other weights do not require grad meanwhile."""
    model, subsets = net(1), ["all", "last_layer"]
    alone, before = [numbers(model, backend, subset) for subset in subsets], as_found(model)
    for _ in range(attacks(50)):
        found = at_once(*(lambda subset=subset: numbers(model, backend, subset) for subset in subsets))
        assert all(map(torch.equal, found, alone))
        assert as_found(model) == before


def test_all_backends_and_structures_at_once(attacks):
    """A trace for BackPACK changes how every module is called; attention and cuDNN are restricted while products are formed."""
    model, other = net(1), net(2)
    jobs = [
        (model, "native"),
        (model, "backpack"),
        (model, "native", "all", "lowrank"),
        (other, "native"),
        (other, "asdl"),
        (other, "backpack"),
        (other, "native", "all", "lowrank"),
        (other, "native", "all", "ekfac"),
    ]
    alone, before = [numbers(*job) for job in jobs], as_found(model, other)
    for _ in range(attacks(20)):
        found = at_once(*(lambda job=job: numbers(*job) for job in jobs))
        for result, truth, job in zip(found, alone, jobs, strict=True):
            assert torch.equal(result, truth), job
        assert as_found(model, other) == before


@pytest.mark.parametrize("backend", BACKENDS)
def test_models_with_a_module_in_common(backend, attacks):
    body = net(1)
    models = [nn.Sequential(body, nn.Linear(3, 3)), nn.Sequential(body, nn.Tanh())]
    alone, before = [numbers(model, backend) for model in models], as_found(*models)
    for _ in range(attacks(20)):
        found = at_once(*(lambda model=model: numbers(model, backend) for model in models))
        assert all(map(torch.equal, found, alone))
        assert as_found(*models) == before


@pytest.mark.parametrize("backend", BACKENDS)
def test_one_posterior_that_predicts_in_many_threads(backend, attacks):
    model = net(1)
    la = Laplace(model, "classification", "last_layer", backend=backend)
    la.fit(batches())
    inputs = [x for x, _ in batches(1)]
    alone, before = [la(x) for x in inputs], as_found(model)
    for _ in range(attacks(50)):
        found = at_once(*(lambda x=x: la(x) for x in inputs))
        assert all(map(torch.equal, found, alone))
        assert as_found(model) == before


@pytest.mark.parametrize("backend", BACKENDS)
def test_one_posterior_that_is_fitted_and_predicts(backend, attacks):
    model = net(1)
    la = Laplace(model, "classification", backend=backend)
    la.fit(batches())
    x = batches(1)[0][0]
    alone, before = la(x), as_found(model)
    for _ in range(attacks(20)):
        _, found, _ = at_once(lambda: la.fit(batches()), lambda: la(x), lambda: la.fit(batches()))
        assert torch.equal(found, alone)
        assert torch.equal(la(x), alone)
        assert as_found(model) == before


def test_a_posterior_made_during_a_pass_covers_all_weights():
    model, entered, made = net(1), threading.Event(), []

    def other():
        entered.wait()
        made.append(Laplace(model, "classification"))

    model[0].register_forward_hook(lambda *_: entered.set())
    at_once(lambda: numbers(model, "native", "last_layer"), other)
    assert len(made[0].parameter_names) == 6


# ------------------------------------------------------------------ who waits for whom


def test_two_models_run_side_by_side_in_the_native_backend():
    """Each forward pass goes on only while the other is in its own, so neither waits for the other's end."""
    meeting = threading.Barrier(2)

    class Meets(nn.Module):
        def forward(self, x):
            meeting.wait(SECONDS)
            return x

    def fit():
        model = nn.Sequential(nn.Linear(5, 3), Meets())
        Laplace(model, "classification").fit(batches())

    at_once(fit, fit)


@pytest.mark.parametrize("backend", BACKENDS)
def test_a_loader_may_wait_for_a_fit_of_the_same_model_in_another_thread(backend):
    model = net(1)
    alone = numbers(model, backend)

    class Fits:
        def __iter__(self):
            for batch in batches():
                assert torch.equal(at_once(lambda: numbers(model, backend))[0], alone)
                yield batch

    la = Laplace(model, "classification", backend=backend)
    at_once(lambda: la.fit(Fits()))


def test_a_model_may_run_a_pass_over_a_part_of_itself():
    class Reflects(nn.Module):
        def __init__(self):
            super().__init__()
            self.frozen, self.head = nn.Linear(5, 3), nn.Linear(3, 3)

        def forward(self, x):
            self.frozen.requires_grad_(True)
            Laplace(self.frozen, "classification").fit(batches())
            self.frozen.requires_grad_(False)
            return self.head(self.frozen(x))

    model = Reflects()
    model.frozen.requires_grad_(False)
    la = Laplace(model, "classification")
    at_once(lambda: la.fit(batches()), lambda: la.fit(batches()))
    assert la.n_data == 36


def test_threads_that_would_wait_for_each_other_are_told_so():
    meeting = threading.Barrier(2)

    class Runs(nn.Linear):
        other: nn.Module

        def forward(self, x):
            if threading.current_thread().name != "free":
                meeting.wait(SECONDS)
                threading.current_thread().name = "free"
                with torch.no_grad():
                    Laplace(self.other, "classification").fit(batches())
            return super().forward(x)

    models = [Runs(5, 3), Runs(5, 3)]
    object.__setattr__(models[0], "other", models[1])
    object.__setattr__(models[1], "other", models[0])
    with pytest.raises(RuntimeError, match="two threads wait for each other"):
        at_once(*(lambda model=model: Laplace(model, "classification").fit(batches()) for model in models))
    Laplace(
        nn.Sequential(models[0].requires_grad_(False), nn.Linear(3, 3)), "classification"
    )  # nothing is held any more


# ------------------------------------------------------------------ training


def train(model: nn.Module, loader=None, **options):
    options = {
        "n_epochs": 4,
        "n_epochs_burnin": 1,
        "marglik_frequency": 1,
        "fit_fraction": 1.0,
        "n_hypersteps": 2,
    } | options
    result = marglik_training(model, loader or batches(), progress_bar=False, **options)
    return result.losses, result.margliks, {name: value.tolist() for name, value in model.state_dict().items()}


def plain(seed: int) -> nn.Sequential:
    """Draws nothing from torch's global random state, of which there is one for all threads."""
    model = net(seed)
    model[3].p = 0.0
    return model


@pytest.mark.parametrize("backend", BACKENDS)
def test_two_threads_that_train_two_models(backend, attacks):
    rng = torch.get_rng_state()
    for _ in range(attacks(20)):
        models, same = [plain(1), plain(2)], [plain(1), plain(2)]
        torch.set_rng_state(rng)
        alone = [train(model, backend=backend) for model in same]
        found = at_once(*(lambda model=model: train(model, backend=backend) for model in models))
        assert found == alone
        assert torch.equal(torch.get_rng_state(), rng)
        assert all(module.training for model in models for module in model.modules())


def test_dropout_and_shuffles_of_two_trainings_leave_the_random_state_as_found(attacks):
    data = TensorDataset(*(torch.cat(part) for part in zip(*batches(), strict=True)))
    for _ in range(attacks(20)):
        models, before = [net(1), net(2)], torch.get_rng_state()
        loaders = [DataLoader(data, batch_size=8, shuffle=True) for _ in models]
        at_once(*(lambda m=m, loader=loader: train(m, loader) for m, loader in zip(models, loaders, strict=True)))
        assert torch.equal(torch.get_rng_state(), before)


@pytest.mark.parametrize("backend", BACKENDS)
def test_predictions_beside_a_training_of_the_same_model(backend, attacks):
    """Training is what it is alone, statistics of BatchNorm included."""
    for _ in range(attacks(10)):
        same, model, is_over = plain(1), plain(1), threading.Event()
        alone = train(same)

        def trains(model=model, is_over=is_over):
            try:
                return train(model)
            finally:
                is_over.set()

        def predicts(model=model, is_over=is_over):
            while not is_over.is_set():
                Laplace(model, "classification", "last_layer", backend=backend).fit(batches())

        assert at_once(trains, predicts)[0] == alone
        assert all(module.training for module in model.modules())


def test_a_model_is_trained_by_one_thread_at_a_time():
    model, is_training, may_end = plain(1), threading.Event(), threading.Event()

    def first():
        def on_epoch(record):
            is_training.set()
            may_end.wait(SECONDS)

        return train(model, on_epoch=on_epoch)

    def second():
        is_training.wait(SECONDS)
        try:
            with pytest.raises(
                RuntimeError, match="Sequential is being trained by another thread; wait for its end, or train a copy"
            ):
                train(model)
        finally:
            may_end.set()

    at_once(first, second)
    train(model)
