"""K-FAC-expand and K-FAC-reduce as a preconditioner of gradient steps."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import asdict
from typing import Any

import torch
from torch import nn

from laplace_ws.curvature import Curvature
from laplace_ws.curvature.capture import BatchForm, TrainingCapture
from laplace_ws.curvature.curvature_sum import default_generator
from laplace_ws.curvature.models import check_module, check_visible
from laplace_ws.curvature.processes import check_not_wrapped, unwrapped
from laplace_ws.errors import NotFittedError
from laplace_ws.kfac import KfacApproxSpec, approximation_by_parameter
from laplace_ws.kfac.uses import at_least_float32
from laplace_ws.likelihoods import Likelihood, make_likelihood
from laplace_ws.matrices import Kron, KronBlock
from laplace_ws.optim.curvature import FACTORS, LayerFinder, LikelihoodColumns, averaged_factors, divided_inverses
from laplace_ws.optim.first_order import Grafting
from laplace_ws.optim.layers import Layer
from laplace_ws.optim.options import KfacOptions, LossReduction, Timer, checked_group
from laplace_ws.optim.scaling import has_overflowed, loss_scale, unscale
from laplace_ws.optim.stacks import Stacks
from laplace_ws.optim.statistics import kron_blocks
from laplace_ws.optim.steps import apply_steps, directions


class KFAC(torch.optim.Optimizer):
    """Gradient steps preconditioned by K-FAC, for every network whose weights have Kronecker blocks.

    The direction of a weight W, with its bias b as a further column, is B⁻¹ M A⁻¹: M the Nesterov average of its gradients, A and B the
    decayed averages of its Kronecker factors over the batches, damped. Its length is that of the step that a first-order method would take
    (`grafting`), so that learning rates and schedules of that method serve. What has no block of its own (scales of normalisations,
    position parameters, an embedding tied to the output layer) takes the first-order step itself. The loop is the usual one::

        optimizer = KFAC(model, lr=1e-2)
        for x, y in loader:
            optimizer.zero_grad()
            loss_fn(model(x), y).backward()
            optimizer.step()

    The factors come from the passes of the step itself, on the steps on which they are due: A from the forward pass, B from the backward
    pass. Call the model itself, in train mode, and differentiate each forward pass once. `optimizer.zero_grad()` also forgets passes that
    were differentiated and took part in no step.

    Args:
        model: the network.
        params: which of its parameters, or groups of them with options of their own (lr, betas, eps, weight_decay, damping,
            kfac_approx), as for every optimiser of torch; all that require grad where not given. Those of other modules take the
            first-order step.
        lr: length of the steps, in units of those of the grafted method.
        betas: decay of the averages of gradients and of their squares.
        eps: added to the root of the latter.
        weight_decay: share of a weight that is taken away at each step, in units of lr.
        kfac_approx: "expand", "reduce", or a mapping from patterns of names to them; "auto", and a name that no pattern matches, is expand.
        damping: λ; a factor X is inverted as X + λ·(tr X/D)·I. Of a weight and its bias, that of the weight counts.
        curvature: "ef" (gradients of the loss), "ggn_mc" (sampled labels), "ggn_mc_rademacher" (random signs) or "ggn" (all columns). All
            but "ef" take backward passes of their own, on steps on which factors are due.
        likelihood: "classification", "regression", …, or a `Likelihood`, of all curvatures but "ef".
        mc_samples: random columns per example.
        generator: of labels or signs; by default a separate one, which `torch.manual_seed` makes reproducible.
        factor_decay: of the averages of the factors, per step that counts.
        factor_update_steps: steps from one that counts to the next.
        inv_update_steps: steps from one inversion to the next.
        start_steps: first steps, on each of which both are done.
        grafting: "adam", "sgd" or "none".
        kl_clip: limit of lr²·Σ ⟨step, gradient⟩, beyond which all steps are shortened alike; None for none.
        max_factor_dim: larger factors are kept as blocks of at most this many rows on their diagonal; None for no limit.
        factor_dtype: type of factors and inverses; by default that of the weights, float32 at least.
        loss_reduction: "mean" or "sum": what the loss does with the losses of the examples. Any other factor on the loss scales B by its
            square, which matters without grafting only, and to `kron`.
        grad_scaler: the scaler of the loss, if there is one.
        strict: whether a weight (of two axes or more) without a Kronecker block is an error.

    Raises:
        UnsupportedParameterError: the operations of the model cannot be seen; or, in a forward pass, a weight cannot have the block that
            was chosen, or, with `strict`, has none.
        ValueError: an option is out of its range.

    Source: Martens & Grosse 2015; Eschenhagen et al. 2023, for expand and reduce; Agarwal et al. 2020, for grafting.
    """

    _step_supports_amp_scaling = True
    """Makes a `GradScaler` say that it has scaled the loss, and by how much; see `torch.amp.GradScaler.step`."""

    def __init__(
        self,
        model: nn.Module,
        params: Iterable[Any] | None = None,
        lr: float = 1e-2,
        *,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
        weight_decay: float = 0.0,
        kfac_approx: KfacApproxSpec = "expand",
        damping: float = 0.1,
        curvature: str | Curvature = "ef",
        likelihood: str | Likelihood | None = None,
        mc_samples: int = 1,
        generator: torch.Generator | None = None,
        factor_decay: float = 0.95,
        factor_update_steps: int = 10,
        inv_update_steps: int = 10,
        start_steps: int = 10,
        grafting: str | Grafting = "adam",
        kl_clip: float | None = None,
        max_factor_dim: int | None = 8192,
        factor_dtype: torch.dtype | None = None,
        loss_reduction: str | LossReduction = "mean",
        grad_scaler: torch.amp.GradScaler | None = None,
        strict: bool = False,
    ) -> None:
        model = unwrapped(model)
        check_module(model)
        check_not_wrapped(model)
        self.model = model
        self.options: KfacOptions = KfacOptions(
            curvature=Curvature(curvature),
            likelihood=None if likelihood is None else make_likelihood(likelihood).at_noise(1.0),
            mc_samples=mc_samples,
            factor_decay=factor_decay,
            factor_update_steps=factor_update_steps,
            inv_update_steps=inv_update_steps,
            start_steps=start_steps,
            grafting=Grafting(grafting),
            kl_clip=kl_clip,
            max_factor_dim=max_factor_dim,
            factor_dtype=factor_dtype,
            loss_reduction=LossReduction(loss_reduction),
            grad_scaler=grad_scaler,
            strict=strict,
        )
        self.n_steps: int = 0
        self._finder = LayerFinder({}, {}, max_factor_dim, strict, {}, {})
        trainable = [p for p in model.parameters() if p.requires_grad]
        defaults: dict[str, Any] = {
            "lr": lr, "betas": betas, "eps": eps, "weight_decay": weight_decay, "damping": damping, "kfac_approx": kfac_approx,
        }  # fmt: skip
        super().__init__(trainable if params is None else params, checked_group(defaults))
        check_visible(model, self._finder.parameters.values())
        device = self.param_groups[0]["params"][0].device
        self.generator: torch.Generator = generator or default_generator(device)
        columns = None
        if self.options.likelihood is not None:
            columns = LikelihoodColumns(self.options.likelihood, self.options.curvature, mc_samples, self.generator)
        self._factor_timer = Timer(factor_update_steps, start_steps)
        self._inverse_timer = Timer(inv_update_steps, start_steps)
        self._stacks = Stacks(self._finder.layers, self._finder.parameters, self.state)
        finder = self._finder  # of which alone the capture knows, so that the optimizer can be deleted
        self._capture = TrainingCapture(model, self._finder.watched, self._finder, columns, lambda: finder.reduced)
        self._capture.is_on = True

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """See `torch.optim.Optimizer.add_param_group`; checks the options of the group."""
        own = checked_group({**self.defaults, **param_group})
        names = {id(p): name for name, p in self.model.named_parameters()}
        by_name = approximation_by_parameter(own["kfac_approx"], list(names.values()))
        super().add_param_group({**param_group, **own})
        for p in self.param_groups[-1]["params"]:
            name = names.get(id(p))
            if name is not None and p.requires_grad:
                self._finder.parameters[name] = self._finder.watched[name] = p
                self._finder.approximations[name] = by_name[name].decided(False)

    @property
    def layers(self) -> Mapping[str, Layer]:
        """The weights with a Kronecker block that passes so far have shown, by name, and their biases."""
        return dict(self._finder.layers)

    # ------------------------------------------------------------------ steps

    def zero_grad(self, set_to_none: bool = True) -> None:
        """See `torch.optim.Optimizer.zero_grad`; the statistics of passes that were differentiated and took part in no step go too."""
        super().zero_grad(set_to_none)
        self._capture.drop()

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:  # type: ignore[override]
        """Take a step.

        Args:
            closure: computes the loss and its gradients anew, and returns the loss.

        Raises:
            FloatingPointError: a factor is not finite; nothing has changed.
            RuntimeError: no pass of the model has been seen; nothing has changed.
            ValueError: it is not known by how much a `GradScaler` scaled the loss; nothing has changed.
        """
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        parameters = [p for group in self.param_groups for p in group["params"] if p.grad is not None]
        of_loss = loss_scale(self, self.options.grad_scaler)
        if not parameters or has_overflowed(self):
            self._capture.drop()
            return loss
        for p in parameters:
            if p.grad is not None and p.grad.is_sparse:
                raise ValueError("a gradient is sparse, and KFAC takes dense ones; make embeddings with sparse=False.")
        self._update_curvature(of_loss)
        unscale(self, parameters)
        steps = directions(self.param_groups, self.state, self._stacks, self.options.grafting)
        apply_steps(self.param_groups, steps, self.options.kl_clip)
        self.n_steps += 1
        self._capture.is_on = self._factor_timer.is_due(self.n_steps)
        return loss

    def _update_curvature(self, of_loss: float) -> None:
        """Take the statistics of the passes since the last step into the averages, and invert these, as far as either is due.

        Nothing is changed before all of it is known to be sound.
        """
        are_due = self._factor_timer.is_due(self.n_steps)
        batches = self._capture.take() if are_due else []
        if are_due and self._capture.form is None:
            raise RuntimeError(
                f"no pass of the model has been seen: call the {type(self.model).__name__} that KFAC was given, in train mode, after KFAC "
                "was made, and differentiate what it returns."
            )
        states = {name: self._state_of(name) for name in self._finder.layers}
        found = averaged_factors(batches, states, self.options, of_loss) if batches else {}
        if self._inverse_timer.is_due(self.n_steps):
            known = {name: {**states[name], **found.get(name, {})} for name in self._finder.layers}
            known = {name: state for name, state in known.items() if "factor_A" in state}
            damping = {name: self._group_of(name)["damping"] for name in known}
            for name, inverses in divided_inverses(self._finder.layers, known, damping).items():
                found.setdefault(name, {}).update(inverses)
            self._inverse_timer.done(self.n_steps)
            self._stacks.forget()
        for name, state in found.items():
            self.state[self._finder.parameters[name]].update(state)
        if batches:
            self._factor_timer.done(self.n_steps)

    # ------------------------------------------------------------------ curvature

    @property
    def curvature(self) -> Curvature:
        """Which curvature the factors are of."""
        return self.options.curvature

    @property
    def n_arguments(self) -> int:
        """With how many arguments the model was called last."""
        return self._form.n_arguments

    @property
    def output_shape(self) -> tuple[int, ...]:
        """Of the model's output for one example.

        Raises:
            NotFittedError: no pass of the model was seen.
        """
        if self._form.output_shape is None:
            raise NotFittedError(
                "the model returns no tensor with an axis of examples, so that it has no shape of outputs."
            )
        return self._form.output_shape

    @property
    def _form(self) -> BatchForm:
        if self._capture.form is None:
            raise NotFittedError("KFAC has seen no pass of the model yet; take a step first.")
        return self._capture.form

    def kron(self, n_data: int = 1) -> Kron:
        """The averages of the factors as the curvature of a negative log likelihood summed over N examples.

        They are those of the loss and of the network as it was trained, dropout and statistics over the batch included, averaged over the
        last 1/(1 − factor_decay) steps that counted, at the weights that these had. The block of a bias is that of `kron_factors`, up to
        terms between the groups of its weight.

        Args:
            n_data: N.
        """
        blocks: dict[str, KronBlock] = {}
        for name, layer in self._finder.layers.items():
            state = self._state_of(name)
            if "factor_A" in state:
                n_inputs = state["n_inputs"] * n_data
                n_inputs = n_inputs if n_inputs.ndim else n_inputs.item()
                A, B = (at_least_float32(state[f"factor_{factor}"]) for factor in "AB")
                blocks |= kron_blocks(layer, A, B * n_data, n_inputs, self._finder.parameters[name].shape)
        return Kron(blocks)

    # ------------------------------------------------------------------ files

    def state_dict(self) -> dict[str, Any]:
        """See `torch.optim.Optimizer.state_dict`; what is not of one parameter stands under "kfac"."""
        return {**super().state_dict(), "kfac": self._own_state()}

    def _own_state(self) -> dict[str, Any]:
        form = self._capture.form
        return {
            "n_steps": self.n_steps,
            "next_factors": self._factor_timer.next,
            "next_inverses": self._inverse_timer.next,
            "layers": [layer.state() for layer in self._finder.layers.values()],
            "form": None if form is None else asdict(form),
            "time_first": sorted(self._capture.rows.time_first),
            "generator": self.generator.get_state(),
        }

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """See `torch.optim.Optimizer.load_state_dict`; the factors keep the precision that they were saved in.

        Raises:
            ValueError: it is the state of another optimiser.
        """
        if "kfac" not in state_dict:
            raise ValueError(
                "the state is not one of KFAC, as it has no entry 'kfac'; give what KFAC.state_dict() returned."
            )
        super().load_state_dict(state_dict)
        places = [i for group in state_dict["param_groups"] for i in group["params"]]
        parameters = [p for group in self.param_groups for p in group["params"]]
        for i, p in zip(places, parameters, strict=True):
            for name in FACTORS:
                if name in state_dict["state"].get(i, {}):
                    self.state[p][name] = state_dict["state"][i][name].detach().clone().to(p.device)
        own = state_dict["kfac"]
        self.n_steps = own["n_steps"]
        self._factor_timer.next, self._inverse_timer.next = own["next_factors"], own["next_inverses"]
        self._finder.layers.clear()
        self._finder.layers |= {state["weight"]: Layer.from_state(state) for state in own["layers"]}
        self._stacks = Stacks(self._finder.layers, self._finder.parameters, self.state)
        self._capture.drop()
        self._capture.form = None if own["form"] is None else BatchForm(**own["form"])
        self._capture.is_on = self._factor_timer.is_due(self.n_steps)
        self._capture.rows.time_first.update(own.get("time_first", ()))
        self.generator.set_state(own["generator"].cpu())

    def __reduce__(self) -> Any:
        raise TypeError(
            "a KFAC cannot be copied or pickled, as it records the passes of its model; make one for the copy of the model, and give it "
            "state_dict()."
        )

    # ------------------------------------------------------------------ parts

    def _state_of(self, name: str) -> dict[str, Any]:
        return self.state.get(self._finder.parameters[name], {})

    def _group_of(self, name: str) -> dict[str, Any]:
        p = self._finder.parameters[name]
        return next(group for group in self.param_groups if any(p is other for other in group["params"]))
