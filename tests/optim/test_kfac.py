"""Steps of KFAC against dense algebra, and in the company of what else a training has."""

import copy
import gc
import io
import pickle
import weakref

import pytest
import torch
from cases import double
from torch import nn

from laplace_ws import NumericalRepairWarning, UnsupportedParameterError, kron_factors
from laplace_ws.curvature import exact
from laplace_ws.optim import KFAC
from laplace_ws.optim.factor import FactorForm

CROSS_ENTROPY = nn.functional.cross_entropy


def mlp(dtype=torch.float64):
    return double(nn.Sequential(nn.Linear(3, 5), nn.Tanh(), nn.Linear(5, 3))).to(dtype)


def batch(n=8, dtype=torch.float64):
    return torch.randn(n, 3, dtype=dtype), torch.randint(0, 3, (n,))


def train(model, optimizer, batches):
    for x, y in batches:
        optimizer.zero_grad()
        CROSS_ENTROPY(model(x), y).backward()
        optimizer.step()


def weights(model):
    return [p.detach().clone() for p in model.parameters()]


def moved_by(model, act):
    before = weights(model)
    act()
    return {name: p.detach() - b for (name, p), b in zip(model.named_parameters(), before, strict=True)}


# ------------------------------------------------------------------ directions


@pytest.mark.parametrize("approx", ["expand", "reduce"])
def test_direction_is_the_dense_inverse_of_the_damped_factors(approx):
    model = double(nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 2, bias=False)))
    x, y = torch.randn(6, 5, 3).double(), torch.randn(6, 5, 2).double()
    optimizer = KFAC(
        model, lr=0.1, grafting="none", damping=0.2, kfac_approx=approx, loss_reduction="sum", betas=(0.0, 0.9)
    )
    loss = 0.5 * (model(x) - y).square().sum()
    loss.backward()
    gradients = {name: p.grad.clone() for name, p in model.named_parameters()}
    kron = kron_factors(model, "regression", [(x, y)], curvature="ef", kfac_approx=approx)
    moved = moved_by(model, optimizer.step)
    inputs = {"0.weight": x, "2.weight": torch.tanh(nn.functional.linear(x, *weights_before(moved, model)))}
    for name in ("0.weight", "2.weight"):
        a = inputs[name].mean(1) if approx == "reduce" else inputs[name].flatten(0, 1)
        matrix = gradients[name]
        if name == "0.weight":
            a = torch.cat([a, torch.ones(len(a), 1).double()], 1)
            matrix = torch.cat([matrix, gradients["0.bias"][:, None]], 1)
        A, B = a.T @ a / len(a), kron[name].B / len(x)
        A, B = (X + 0.2 * X.trace() / len(X) * torch.eye(len(X)).double() for X in (A, B))
        dense = torch.linalg.solve(torch.kron(B, A), matrix.flatten()).view_as(matrix)
        found = moved[name] if name == "2.weight" else torch.cat([moved[name], moved["0.bias"][:, None]], 1)
        torch.testing.assert_close(found, -0.1 * dense, rtol=1e-9, atol=1e-12)


def weights_before(moved, model):
    return [dict(model.named_parameters())[name].detach() - moved[name] for name in ("0.weight", "0.bias")]


def test_step_of_a_deep_linear_network_is_the_natural_gradient_step():
    """Layer by layer, as nothing is shared and the loss is quadratic, so that each block is a Kronecker product."""
    model = double(nn.Sequential(nn.Linear(3, 2, bias=False), nn.Linear(2, 2, bias=False)))
    x, y = torch.randn(9, 3).double(), torch.randn(9, 2).double()
    G, places = exact.ggn(model, "regression", x, y), exact.parameter_slices(model)
    optimizer = KFAC(
        model,
        lr=1.0,
        grafting="none",
        damping=1e-14,
        curvature="ggn",
        likelihood="regression",
        loss_reduction="sum",
        betas=(0.0, 0.9),
    )
    (0.5 * (model(x) - y).square().sum()).backward()
    gradients = {name: p.grad.clone() for name, p in model.named_parameters()}
    moved = moved_by(model, optimizer.step)
    for name, where in places.items():
        natural = torch.linalg.solve(G[where, where], gradients[name].flatten())
        # factors are means over the examples, the curvature a sum: the step is N times that of the sum
        torch.testing.assert_close(moved[name].flatten(), -9 * natural, rtol=1e-6, atol=1e-9)


@pytest.mark.parametrize("max_factor_dim", [None, 2])
@pytest.mark.parametrize("grafting", ["adam", "sgd"])
def test_grafted_steps_have_the_length_of_the_first_order_step(grafting, max_factor_dim):
    model, (x, y) = mlp(), batch()
    optimizer = KFAC(model, lr=0.01, grafting=grafting, max_factor_dim=max_factor_dim, betas=(0.0, 0.999), eps=0.0)
    CROSS_ENTROPY(model(x), y).backward()
    # without averages the first step of Adam is the sign of the gradient
    first_order = {"adam": torch.sign, "sgd": torch.clone}[grafting]
    theirs = {name: -0.01 * first_order(p.grad) for name, p in model.named_parameters()}
    mine = moved_by(model, optimizer.step)
    for layer in ("0", "2"):
        length = [
            torch.cat([moved[f"{layer}.weight"].flatten(), moved[f"{layer}.bias"]]).norm() for moved in (mine, theirs)
        ]
        torch.testing.assert_close(*length, rtol=1e-5, atol=0)
        assert not torch.allclose(mine[f"{layer}.weight"], theirs[f"{layer}.weight"], rtol=0.01)


def test_what_has_no_block_takes_the_step_of_nadamw():
    class Scaled(nn.Module):
        def __init__(self):
            super().__init__()
            self.scale = nn.Parameter(torch.randn(3).double())
            self.norm = nn.LayerNorm(3).double()

        def forward(self, x):
            return self.norm(x * self.scale)

    model = Scaled()
    x = torch.randn(8, 3).double()
    optimizer = KFAC(model, lr=0.03, weight_decay=0.1, betas=(0.9, 0.99), eps=1e-6)
    p = model.scale.detach().clone()
    m, v = torch.zeros(3).double(), torch.zeros(3).double()
    for t in range(1, 5):
        optimizer.zero_grad()
        model(x).pow(3).sum().backward()
        g = model.scale.grad.clone()
        m, v = 0.9 * m + 0.1 * g, 0.99 * v + 0.01 * g * g
        nesterov = 0.9 * m / (1 - 0.9 ** (t + 1)) + 0.1 * g / (1 - 0.9**t)
        p = p * (1 - 0.03 * 0.1) - 0.03 * nesterov / ((v / (1 - 0.99**t)).sqrt() + 1e-6)
        optimizer.step()
        torch.testing.assert_close(model.scale.detach(), p, rtol=1e-12, atol=1e-12)


def test_kl_clip_limits_the_step():
    model, (x, y) = mlp(), batch()
    lengths = []
    for kl_clip in (None, 1e-8):
        m = copy.deepcopy(model)
        optimizer = KFAC(m, lr=0.1, grafting="none", kl_clip=kl_clip, betas=(0.0, 0.9))
        CROSS_ENTROPY(m(x), y).backward()
        gradients = {name: p.grad.clone() for name, p in m.named_parameters()}
        moved = moved_by(m, optimizer.step)
        lengths.append(-0.1 * sum((moved[name] * gradients[name]).sum() for name in moved))
    free, clipped = (length.item() for length in lengths)
    assert free > 1e-6
    # lr² Σ ⟨step, gradient⟩ of the unclipped step is shortened to √(kl_clip · itself)
    assert clipped == pytest.approx((1e-8 * free) ** 0.5, rel=1e-9)


# ------------------------------------------------------------------ parameters


def test_groups_have_their_own_options():
    model, (x, y) = mlp(), batch()
    biases = [p for name, p in model.named_parameters() if name.endswith("bias")]
    first, last = model[0].weight, model[2].weight
    groups = [
        {"params": [first], "kfac_approx": "reduce", "damping": 0.5},
        {"params": [last], "lr": 0.0},
        {"params": biases, "weight_decay": 0.0},
    ]
    optimizer = KFAC(model, groups, lr=0.1, weight_decay=0.1)
    moved = moved_by(model, lambda: train(model, optimizer, [(x, y)]))
    assert optimizer.layers["0.weight"].approx.value == "reduce"
    assert optimizer.layers["2.weight"].approx.value == "expand"
    assert optimizer.layers["0.weight"].bias == "0.bias"
    assert moved["2.weight"].count_nonzero() == 0
    assert moved["2.bias"].count_nonzero() == 3
    state = optimizer.state[first]
    inverse = optimizer.layers["0.weight"].A.damped_inverse(state["factor_A"], 0.5, "it")
    torch.testing.assert_close(state["inv_A"], inverse)


def test_weight_and_bias_in_groups_of_their_own_step_as_in_one():
    model, (x, y) = mlp(), batch()
    other = copy.deepcopy(model)
    split = [{"params": [p for p in other.parameters() if (p.ndim > 1) == is_weight]} for is_weight in (True, False)]
    train(model, KFAC(model, lr=0.1), [(x, y)] * 3)
    train(other, KFAC(other, split, lr=0.1), [(x, y)] * 3)
    assert all(map(torch.equal, model.parameters(), other.parameters()))


def test_a_mapping_of_approximations_and_a_group_that_is_added():
    model, (x, y) = mlp(), batch()
    optimizer = KFAC(model, model[0].parameters(), kfac_approx={"2.*": "reduce", "0.weight": "expand"})
    train(model, optimizer, [(x, y)])
    assert set(optimizer.layers) == {"0.weight"}
    optimizer.add_param_group({"params": model[2].parameters()})
    train(model, optimizer, [(x, y)])
    assert {name: layer.approx.value for name, layer in optimizer.layers.items()} == {
        "0.weight": "expand",
        "2.weight": "reduce",
    }


def test_frozen_weights_stay_and_do_not_count():
    model, (x, y) = mlp(), batch()
    model[0].weight.requires_grad_(False)
    optimizer = KFAC(model, lr=0.1)
    moved = moved_by(model, lambda: train(model, optimizer, [(x, y)] * 2))
    assert moved["0.weight"].count_nonzero() == 0
    assert moved["0.bias"].count_nonzero() == 5
    assert set(optimizer.layers) == {"2.weight"}


def test_tied_weights_have_one_block_or_a_first_order_step():
    class Tied(nn.Module):
        def __init__(self):
            super().__init__()
            self.embed, self.inner, self.head = nn.Embedding(7, 4), nn.Linear(4, 4), nn.Linear(4, 7, bias=False)
            self.head.weight = self.embed.weight

        def forward(self, x):
            h = self.embed(x).mean(1)
            return self.head(torch.tanh(self.inner(torch.tanh(self.inner(h)))))

    model = double(Tied())
    optimizer = KFAC(model, lr=0.1)
    x, y = torch.randint(0, 7, (6, 3)), torch.randint(0, 7, (6,))
    moved = moved_by(model, lambda: train(model, optimizer, [(x, y)]))
    assert set(optimizer.layers) == {"inner.weight"}
    assert moved["embed.weight"].count_nonzero() > 0
    strict = KFAC(model, strict=True)
    with pytest.raises(UnsupportedParameterError, match=r"^'embed.weight' has no Kronecker block"):
        model(x)
    assert not strict.state


def test_a_layer_that_is_not_always_used():
    class Sometimes(nn.Module):
        def __init__(self):
            super().__init__()
            self.first, self.second, self.head = nn.Linear(3, 4), nn.Linear(3, 4), nn.Linear(4, 3)
            self.which = 0

        def forward(self, x):
            return self.head(torch.tanh((self.first, self.second)[self.which](x)))

    model, (x, y) = double(Sometimes()), batch()
    optimizer = KFAC(model, lr=0.1)
    train(model, optimizer, [(x, y)])
    before = optimizer.state[model.first.weight]["factor_A"].clone()
    model.which = 1
    train(model, optimizer, [(x, y)])
    assert set(optimizer.layers) == {"first.weight", "head.weight", "second.weight"}
    assert torch.equal(optimizer.state[model.first.weight]["factor_A"], before)
    assert "inv_A" in optimizer.state[model.second.weight]


# ------------------------------------------------------------------ the training around it


def test_closure_and_schedulers():
    model, (x, y) = mlp(), batch()
    other = copy.deepcopy(model)
    optimizers = [KFAC(m, lr=0.1) for m in (model, other)]
    schedulers = [torch.optim.lr_scheduler.OneCycleLR(o, 0.1, total_steps=6, cycle_momentum=False) for o in optimizers]

    def closure():
        optimizers[0].zero_grad()
        loss = CROSS_ENTROPY(model(x), y)
        loss.backward()
        return loss

    for _ in range(5):
        before = CROSS_ENTROPY(model(x), y).item()
        assert optimizers[0].step(closure).item() == before
        train(other, optimizers[1], [(x, y)])
        for scheduler in schedulers:
            scheduler.step()
    assert all(map(torch.equal, model.parameters(), other.parameters()))
    assert optimizers[0].param_groups[0]["lr"] < 0.1


def test_clipping_changes_the_step_and_not_the_factors():
    model, (x, y) = mlp(), batch()
    other = copy.deepcopy(model)
    krons, moved = [], []
    for m, limit in ((model, None), (other, 1e-3)):
        optimizer = KFAC(m, lr=0.1, grafting="sgd")

        def one_step(m=m, limit=limit, optimizer=optimizer):
            CROSS_ENTROPY(m(x), y).backward()
            if limit is not None:
                nn.utils.clip_grad_norm_(m.parameters(), limit)
            optimizer.step()

        moved.append(moved_by(m, one_step))
        krons.append(optimizer.kron())
    assert all(torch.equal(krons[0][name].to_dense(), krons[1][name].to_dense()) for name in krons[0])
    assert moved[1]["0.weight"].norm() < 0.1 * moved[0]["0.weight"].norm()


@pytest.mark.parametrize("clips", [False, True])
@pytest.mark.parametrize("is_given", [False, True])
def test_grad_scaler(is_given, clips):
    model, (x, y) = mlp(torch.float32), batch(dtype=torch.float32)
    other = copy.deepcopy(model)
    train(other, (plain := KFAC(other, lr=0.1, grafting="none")), [(x, y)])
    scaler = torch.amp.GradScaler("cpu", init_scale=1024.0, growth_interval=1)
    optimizer = KFAC(model, lr=0.1, grafting="none", grad_scaler=scaler if is_given else None)
    scaler.scale(CROSS_ENTROPY(model(x), y)).backward()
    if clips:
        scaler.unscale_(optimizer)
        nn.utils.clip_grad_norm_(model.parameters(), 1e6)
    before = weights(model)
    if clips and not is_given:
        with pytest.raises(ValueError, match=r"give it to the optimizer, KFAC\(model, grad_scaler=scaler\)"):
            scaler.step(optimizer)
        assert not optimizer.state
        assert all(map(torch.equal, model.parameters(), before))
        return
    scaler.step(optimizer)
    scaler.update()
    for p, q in zip(model.parameters(), other.parameters(), strict=True):
        torch.testing.assert_close(p, q, rtol=1e-5, atol=1e-7)
    for name, block in optimizer.kron().items():
        torch.testing.assert_close(block.to_dense(), plain.kron()[name].to_dense(), rtol=1e-5, atol=1e-9)


def test_a_step_that_overflowed_leaves_no_trace():
    model, (x, y) = mlp(torch.float32), batch(dtype=torch.float32)
    scaler = torch.amp.GradScaler("cpu", init_scale=1e38)
    optimizer = KFAC(model, lr=0.1, grad_scaler=scaler)
    before = weights(model)
    for _ in range(2):
        model.zero_grad()
        scaler.scale(1e5 * CROSS_ENTROPY(model(x), y)).backward()
        scaler.step(optimizer)
        scaler.update(1024.0 if _ else None)
    assert all(map(torch.equal, model.parameters(), before))
    assert not optimizer.state
    model.zero_grad()
    scaler.scale(CROSS_ENTROPY(model(x), y)).backward()
    scaler.step(optimizer)
    assert optimizer.n_steps == 1


def test_dropout_and_batch_statistics():
    model = double(nn.Sequential(nn.Linear(3, 6), nn.BatchNorm1d(6), nn.Dropout(0.5), nn.ReLU(), nn.Linear(6, 3)))
    optimizer = KFAC(model, lr=0.01)
    x, y = batch(32)
    first = CROSS_ENTROPY(model.eval()(x), y).item()
    model.train()
    train(model, optimizer, [(x, y)] * 30)
    assert set(optimizer.layers) == {"0.weight", "4.weight"}
    assert CROSS_ENTROPY(model.eval()(x), y).item() < first


def test_half_precision():
    model, (x, y) = mlp(torch.bfloat16), batch(dtype=torch.bfloat16)
    optimizer = KFAC(model, lr=0.1)
    train(model, optimizer, [(x, y)] * 3)
    state = optimizer.state[model[0].weight]
    assert (state["factor_A"].dtype, state["inv_B"].dtype) == (torch.float32, torch.float32)
    assert model[0].weight.dtype == torch.bfloat16
    rounded = KFAC(model, lr=0.1, factor_dtype=torch.bfloat16)
    train(model, rounded, [(x, y)] * 3)
    assert rounded.state[model[0].weight]["inv_A"].dtype == torch.bfloat16


def test_autocast():
    model, (x, y) = mlp(torch.float32), batch(dtype=torch.float32)
    plain = KFAC(model, lr=0.0)
    train(model, plain, [(x, y)])
    model.zero_grad()
    optimizer = KFAC(model, lr=0.1)
    with torch.autocast("cpu", torch.bfloat16):
        loss = CROSS_ENTROPY(model(x), y)
    loss.backward()
    optimizer.step()
    for name, block in optimizer.kron().items():
        assert block.B.dtype == torch.float32
        assert (block.B - plain.kron()[name].B).norm() < 0.05 * block.B.norm()


# ------------------------------------------------------------------ resuming


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
@pytest.mark.parametrize("at", [1, 5, 10, 13])
@pytest.mark.parametrize("curvature", ["ef", "ggn_mc"])
def test_resumed_is_uninterrupted(at, dtype, curvature):
    options = {"lr": 0.02, "curvature": curvature, "start_steps": 2, "factor_update_steps": 4, "inv_update_steps": 8}
    options |= {} if curvature == "ef" else {"likelihood": "classification"}
    batches = [batch(dtype=dtype) for _ in range(20)]
    whole = mlp(dtype)
    start = copy.deepcopy(whole)
    train(whole, KFAC(whole, generator=torch.Generator().manual_seed(1), **options), batches)
    first = copy.deepcopy(start)
    optimizer = KFAC(first, generator=torch.Generator().manual_seed(1), **options)
    train(first, optimizer, batches[:at])
    file = io.BytesIO()
    torch.save({"model": first.state_dict(), "optimizer": optimizer.state_dict()}, file)
    file.seek(0)
    saved = torch.load(file, weights_only=True)
    second = copy.deepcopy(start)
    second.load_state_dict(saved["model"])
    resumed = KFAC(second, **options)
    resumed.load_state_dict(saved["optimizer"])
    train(second, resumed, batches[at:])
    assert all(map(torch.equal, whole.parameters(), second.parameters()))
    if at > 1:
        fresh = copy.deepcopy(start)
        fresh.load_state_dict(saved["model"])
        train(fresh, KFAC(fresh, **options), batches[at:])
        assert not all(map(torch.equal, whole.parameters(), fresh.parameters()))


# ------------------------------------------------------------------ intervals


def test_factors_and_inverses_are_taken_when_they_are_due():
    model, data = mlp(), [batch() for _ in range(12)]
    optimizer = KFAC(model, lr=0.01, start_steps=2, factor_update_steps=3, inv_update_steps=6)
    of_factors, of_inverses, recorded, seen = [], [], [], (None, None)
    for step, b in enumerate(data):
        recorded += [step] if optimizer._capture.is_on else []
        train(model, optimizer, [b])
        state = optimizer.state[model[0].weight]
        of_factors += [step] if state["factor_A"] is not seen[0] else []
        of_inverses += [step] if state["inv_A"] is not seen[1] else []
        seen = state["factor_A"], state["inv_A"]
    assert of_factors == recorded == [0, 1, 3, 6, 9]
    assert of_inverses == [0, 1, 6]


def test_a_missed_batch_is_made_up_for():
    model, (x, y) = mlp(), batch()
    optimizer = KFAC(model, lr=0.01, start_steps=1, factor_update_steps=2)
    train(model, optimizer, [(x, y)] * 2)
    model.eval()  # step 2, on which factors are due, shows none
    train(model, optimizer, [(x, y)])
    model.train()
    assert optimizer.state[model[0].weight]["n_factors"] == 1
    train(model, optimizer, [(x, y)])
    assert optimizer.state[model[0].weight]["n_factors"] == 2


def test_zero_grad_forgets_what_took_part_in_no_step():
    model, (x, y), (z, w) = mlp(), batch(), batch()
    optimizer = KFAC(model, lr=0.0)
    CROSS_ENTROPY(model(z), w).backward()
    train(model, optimizer, [(x, y)])
    other = KFAC(model, lr=0.0)
    train(model, other, [(x, y)])
    assert torch.equal(optimizer.kron()["0.weight"].B, other.kron()["0.weight"].B)


# ------------------------------------------------------------------ damping


def test_an_indefinite_factor_is_damped_more_with_a_warning():
    form, X = FactorForm(2), torch.tensor([[1.0, 1.2], [1.2, 1.0]])
    with pytest.warns(
        NumericalRepairWarning, match="a Kronecker factor of it is not positive definite with a damping of 0.1"
    ):
        inverse = form.damped_inverse(X, 0.1, "it")
    torch.testing.assert_close(inverse, torch.linalg.inv(X + torch.eye(2)))
    with pytest.raises(FloatingPointError, match="positive definite even with"):
        form.damped_inverse(torch.tensor([[1.0, 1e9], [1e9, 1.0]]), 1e-3, "it")


def test_a_factor_of_zeros_has_the_identity_for_inverse():
    for form in (FactorForm(4), FactorForm(4, n_blocks=2), FactorForm(4, is_diagonal=True)):
        zeros = form.gram(torch.zeros(3, 4)) if not form.is_diagonal else torch.zeros(4)
        inverse = form.damped_inverse(zeros, 0.1, "it")
        torch.testing.assert_close(form.times(torch.eye(4), inverse), torch.eye(4))


@pytest.mark.parametrize("n_blocks", [1, 2, 3])
@pytest.mark.parametrize("n_groups", [None, 2])
def test_inverse_in_blocks_is_the_dense_one(n_blocks, n_groups):
    shape = () if n_groups is None else (n_groups,)
    rows, form = torch.randn(*shape, 9, 7).double(), FactorForm(7, n_blocks)
    X = form.gram(rows)
    dense = form.to_dense(X)
    mean = dense.diagonal(dim1=-2, dim2=-1).mean(-1)[..., None, None]
    truth = torch.linalg.inv(dense + 0.3 * mean * torch.eye(7).double())
    matrix = torch.randn(*shape, 4, 7).double()
    found = form.times(matrix, form.damped_inverse(X, 0.3, "it"))
    torch.testing.assert_close(found, matrix @ truth, rtol=1e-10, atol=1e-12)


# ------------------------------------------------------------------ the model is left alone


def test_copies_and_files_of_the_model_have_nothing_to_do_with_the_optimizer():
    model, (x, y) = mlp(), batch()
    optimizer = KFAC(model, lr=0.1)
    for other in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        CROSS_ENTROPY(other(x), y).backward()
        assert optimizer._capture.take() == []
        assert optimizer._capture.form is None
    with pytest.raises(TypeError, match="a KFAC cannot be copied or pickled"):
        copy.deepcopy(optimizer)


def test_an_optimizer_that_is_deleted_stops_recording():
    model, (x, y) = mlp(), batch()
    optimizer = KFAC(model, lr=0.1)
    train(model, optimizer, [(x, y)])
    gone = weakref.ref(optimizer)
    gc.disable()
    try:
        del optimizer
        assert gone() is None
    finally:
        gc.enable()
    assert not model._forward_hooks
    assert not model._forward_pre_hooks


def test_errors_change_nothing():
    model, (x, y) = mlp(), batch()
    optimizer = KFAC(model, lr=0.1)
    train(model, optimizer, [(x, y)])
    before, state = weights(model), copy.deepcopy(optimizer.state_dict())
    optimizer.zero_grad()
    CROSS_ENTROPY(model(x * float("inf")), y).backward()
    with pytest.raises(FloatingPointError, match=r"the Kronecker factors of '0.weight' are not finite"):
        optimizer.step()
    assert all(map(torch.equal, model.parameters(), before))
    for p, known in state["state"].items():
        for name, value in known.items():
            found = optimizer.state_dict()["state"][p][name]
            assert torch.equal(found, value) if isinstance(value, torch.Tensor) else found == value
    train(model, optimizer, [(x, y)])
    assert optimizer.n_steps == 2


def test_no_pass_of_the_model():
    model, (x, y) = mlp(), batch()
    optimizer = KFAC(model, lr=0.1)
    model.eval()
    before = weights(model)
    with pytest.raises(RuntimeError, match=r"no pass of the model has been seen: call the Sequential .* in train mode"):
        train(model, optimizer, [(x, y)])
    assert all(map(torch.equal, model.parameters(), before))
    assert not optimizer.state
