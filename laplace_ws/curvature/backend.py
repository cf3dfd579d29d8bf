"""The contract of a curvature backend: run the model on a batch, and pull vectors of output space back to every use of a parameter."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager

import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel

from laplace_ws.curvature.inputs import ModelInputs
from laplace_ws.curvature.models import check_module
from laplace_ws.curvature.processes import check_not_wrapped
from laplace_ws.errors import UnsupportedParameterError
from laplace_ws.kfac import Use
from laplace_ws.threads import SharedSetting, alone_with, alone_with_modules

Receiver = Callable[[int, Float[Tensor, "K B ..."]], None]
"""Takes the number of a use, and columns back-propagated to its output."""


class Linearisation(ABC):
    """A model at one batch, linear in its parameters.

    Attributes:
        outputs: f, detached, `[N, ...]`.
        uses: every use of a parameter in the forward pass.
        columns_at_once: how many columns are best passed to one `pullback`.
        column_bytes: bytes that one column takes at the outputs of all uses; 0 where a backend does not report it.
    """

    outputs: Float[Tensor, "N ..."]
    uses: Sequence[Use]
    columns_at_once: int = 1
    column_bytes: int = 0

    @abstractmethod
    def pullback(self, columns: Float[Tensor, "K N ..."]) -> list[Float[Tensor, "K B ..."]]:
        """Back-propagate K columns of output space to the output of each use."""

    def forget_uses(self) -> None:
        """Release the uses, and with them what the forward pass stored; columns can still be pulled back."""
        self.uses = ()

    def stream(self, columns: Float[Tensor, "K N ..."], receive: Receiver, *, is_last: bool = False) -> None:
        """Back-propagate K columns, and pass on each use's part as soon as it is available, so that it need not be stored.

        Args:
            columns: vectors of output space.
            receive: called once for each use, in any order, with its number and the gradients at its output.
            is_last: whether what the forward pass stored may be freed, as no columns follow.
        """
        for number, g in enumerate(self.pullback(columns)):
            receive(number, g)


COLUMN_BYTES = 2**22
"""Memory that the columns of one pullback may take on a CPU, at the outputs of all uses together: beyond its caches, columns processed
together take as long as one after the other."""
COLUMN_SHARE = 0.25
"""The fraction of a GPU's free memory that they may take."""


def memory_for_columns(device: torch.device) -> int:
    """Bytes that the columns of one pullback may take."""
    if device.type == "cuda":
        return int(COLUMN_SHARE * torch.cuda.mem_get_info(device)[0])
    return COLUMN_BYTES


def columns_in_memory(column_bytes: int, device: torch.device) -> int:
    """How many columns to process at once, at least one, given the memory that each takes."""
    return max(1, memory_for_columns(device) // max(1, column_bytes))


class ColumnwiseLinearisation(Linearisation):
    """A linearisation whose columns are pulled back one after the other."""

    def pullback(self, columns: Float[Tensor, "K N ..."]) -> list[Float[Tensor, "K B ..."]]:
        """See `Linearisation.pullback`."""
        pulled = [self._pull(column) for column in columns]
        if len(pulled) == 1:
            return [g[None] for g in pulled[0]]
        return [torch.stack(g) for g in zip(*pulled, strict=True)]

    @abstractmethod
    def _pull(self, column: Float[Tensor, "N ..."]) -> list[Float[Tensor, "B ..."]]:
        """Back-propagate one column to the output of each use."""


class Backend(ABC):
    """Runs models, and provides the uses of parameters and the gradients at their outputs."""

    name: str

    def forget(self) -> None:  # noqa: B027 - most backends keep nothing
        """Drop what is kept of a model from one batch to the next."""

    def rows_are_elsewhere(self, uses: Sequence[Use], n_examples: int, sizes: Sequence[torch.Size]) -> bool:
        """Take note that the rows of some uses are not the examples', which may lie along another axis of their outputs.

        Args:
            uses: these uses.
            n_examples: of the batch.
            sizes: of their outputs.

        Returns:
            Whether a repetition may find other rows.
        """
        return False

    @abstractmethod
    def linearise(
        self, model: nn.Module, x: ModelInputs, parameters: Mapping[str, nn.Parameter]
    ) -> AbstractContextManager[Linearisation]:
        """Run the model on a batch as it is (the caller sets the modes), and leave it as found when the context ends.

        Args:
            model: the network.
            x: inputs of one or more examples; `inputs.call_model` runs the model on them.
            parameters: the parameters to cover, by name.

        Raises:
            UnsupportedParameterError: a parameter is used in a way that the backend cannot cover.
        """


_OLD_PARAMETRISATIONS = {"WeightNorm": "remove_weight_norm", "SpectralNorm": "remove_spectral_norm"}
"""Hooks of the functions in torch.nn.utils that predate torch.nn.utils.parametrizations, and the functions that remove them."""


def trainable_parameters(
    model: nn.Module, covered: Mapping[str, nn.Parameter] | None = None
) -> dict[str, nn.Parameter]:
    """Parameters by name, in the order of the model; a tied parameter appears once, under its first name.

    Args:
        model: the network.
        covered: those that are wanted; by default all that require grad.

    Raises:
        UnsupportedParameterError: there are none, or one of them can have no curvature block, however it is used.
    """
    check_module(model)
    check_not_wrapped(model)
    chosen = None if covered is None else {id(p) for p in covered.values()}
    with alone_with(model):  # while another thread runs it, what requires grad is that thread's choice
        parameters = {
            name: p for name, p in model.named_parameters() if (p.requires_grad if chosen is None else id(p) in chosen)
        }
    if not parameters:
        raise UnsupportedParameterError(
            f"{type(model).__name__} has no parameter that requires grad; unfreeze what the posterior is to be over "
            "(requires_grad_(True))."
        )
    found = {id(p) for p in parameters.values()}
    for module_name, module in model.named_modules():
        is_trained = any(id(p) in found and name != "bias" for name, p in module.named_parameters(recurse=False))
        for hook in module._forward_pre_hooks.values():
            remove = _OLD_PARAMETRISATIONS.get(type(hook).__name__)
            if remove is not None and is_trained:
                raise UnsupportedParameterError(
                    f"{module_name or type(model).__name__!r} has a {vars(hook)['name']} that is computed before each call and has no "
                    f"curvature block; fold it in with torch.nn.utils.{remove}(module), or freeze its parameters."
                )
    for name in parameters:
        module, parametrised, rest = name.partition("parametrizations.")
        if parametrised:
            weight = rest.split(".")[0]
            raise UnsupportedParameterError(
                f"{name!r} parametrises {module + weight!r} (weight_norm, spectral_norm, …) and has no curvature block; fold it in with "
                f"torch.nn.utils.parametrize.remove_parametrizations(module, {weight!r}), or freeze it (requires_grad_(False))."
            )
    return parameters


@contextmanager
def evaluation_mode(model: nn.Module, covered: Mapping[str, nn.Parameter] | None = None) -> Iterator[None]:
    """Put every module in eval mode with gradients enabled, and leave each in the mode it was in; other threads wait with this model.

    Args:
        model: the network.
        covered: if given, these parameters alone require grad.
    """
    if torch.is_inference_mode_enabled():
        raise RuntimeError(
            "curvature needs gradients, which torch.inference_mode() rules out; leave it, or use torch.no_grad()."
        )
    modules = tuple(model.modules())
    with alone_with_modules(modules), torch.enable_grad():
        modes = [(module, module.training) for module in modules]
        changed = [] if covered is None else _others(model, covered)
        try:
            model.eval()
            for p, flag in changed:
                p.requires_grad_(not flag)
            yield
        finally:
            for p, flag in changed:
                p.requires_grad_(flag)
            for module, training in modes:
                if type(module).train is not nn.Module.train:  # it may do more than set the flag
                    module.train(training)
            for module, training in modes:
                module.training = training


def _others(model: nn.Module, covered: Mapping[str, nn.Parameter]) -> list[tuple[nn.Parameter, bool]]:
    """Parameters that require grad and are not covered, or the reverse, and whether they do."""
    chosen = set(map(id, covered.values()))
    return [(p, p.requires_grad) for p in model.parameters() if p.requires_grad != (id(p) in chosen)]


@contextmanager
def differentiable_twice(model: nn.Module) -> Iterator[None]:
    """Restrict torch to kernels with second derivatives, which fused attention and cuDNN's recurrent layers lack."""
    with ExitStack() as stack:
        stack.enter_context(_plain_attention())
        if any(isinstance(module, nn.RNNBase) for module in model.modules()):
            stack.enter_context(_plain_recurrence())
        yield


_plain_attention = SharedSetting(lambda: sdpa_kernel(SDPBackend.MATH))
_plain_recurrence = SharedSetting(lambda: torch.backends.cudnn.flags(enabled=False))
