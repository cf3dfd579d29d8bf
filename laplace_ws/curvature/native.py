"""The native backend: captures uses of parameters as the forward pass makes them, however the code is written."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import replace
from functools import cached_property
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor, nn
from torch.autograd.graph import GradientEdge, get_gradient_edge
from torch.overrides import TorchFunctionMode

from laplace_ws.curvature.attention import Parts, multi_head_attention, read_projection, take_parts
from laplace_ws.curvature.backend import Backend, Linearisation, Receiver, columns_in_memory
from laplace_ws.curvature.batch_axis import OtherBatchAxisError, with_batch_first
from laplace_ws.curvature.calls import (
    IN_PLACE,
    OVERWRITES_INPUT,
    READERS,
    Call,
    NoBatchAxisError,
    UnreadableCallError,
    is_added_to_all,
    of_parameters,
    read_call,
)
from laplace_ws.curvature.checks import check_unchanged, versions
from laplace_ws.curvature.inputs import ModelInputs, call_model, examples_of
from laplace_ws.curvature.operands import Operand
from laplace_ws.curvature.rewrites import REWRITES
from laplace_ws.curvature.selected_rows import SelectedRows
from laplace_ws.errors import UnsupportedParameterError
from laplace_ws.kfac import AbsentUse, ExpressionUse
from laplace_ws.kfac.examples import Examples
from laplace_ws.kfac.uses import Use

FREEZE_HINT = "freeze it (requires_grad_(False))"
FREEZE_OR_WRITE = (
    f"{FREEZE_HINT}, write the layer with calls that have a block (linear, matmul, einsum, conv, embedding, normalisations, scale, bias), "
    'or choose subset_of_weights="last_layer", hessian_structure="lowrank", or "diag" with backend="autograd"'
)


class NativeBackend(Backend):
    """Uses of parameters through a function mode, gradients through graph edges; computes no weight gradient.

    A `TorchFunctionMode` sees every call that takes a registered parameter, and the gradient edge of its output is taken at that
    moment, so later in-place operations do no harm (an output that is a view is copied first). One `torch.autograd.grad` with
    respect to the edges then gives the gradient at every use.
    """

    name = "native"

    def __init__(self) -> None:
        self.time_first: set[str] = set()

    def forget(self) -> None:
        """See `Backend.forget`."""
        self.time_first.clear()

    def rows_are_elsewhere(self, uses: Sequence[Use], n_examples: int, sizes: Sequence[torch.Size]) -> bool:
        """See `Backend.rows_are_elsewhere`."""
        names = {name for use in uses for name in use.parameters}
        if names <= self.time_first or not all(len(size) > 2 and n_examples in size[1:-1] for size in sizes):
            return False
        self.time_first |= names
        return True

    @contextmanager
    def linearise(
        self, model: nn.Module, x: ModelInputs, parameters: Mapping[str, nn.Parameter], *, differentiable: bool = False
    ) -> Iterator[NativeLinearisation]:
        """See `Backend.linearise`; with `differentiable`, outputs, uses and pulled-back columns are differentiable in the inputs."""
        with UseRecorder(parameters, examples_of(x), differentiable, self.time_first) as recorder:
            f = call_model(model, x)
        recorder.check(parameters, f)
        linearisation = NativeLinearisation(f, recorder.kept, differentiable)
        del f, recorder  # they would keep alive what `forget_uses` releases
        yield linearisation


class NativeLinearisation(Linearisation):
    """Outputs of one forward pass, with the autograd graph behind them."""

    def __init__(self, f: Tensor, kept: Sequence[KeptUse], differentiable: bool = False):
        self.outputs: Tensor = f if differentiable else f.detach()
        self.uses: Sequence[Use] = [use for use, _, _ in kept]
        self._f = f
        self._edges = [edge for _, edge, _ in kept]
        self._output_shapes = [shape for _, _, shape in kept]
        outputs = {(edge.node, edge.output_nr): shape.numel() for _, edge, shape in kept}
        self.column_bytes: int = sum(outputs.values()) * f.element_size()
        self.columns_at_once = columns_in_memory(self.column_bytes, f.device)
        self._can_vectorise = True
        self._differentiable = differentiable

    def pullback(self, columns: Float[Tensor, "K N ..."]) -> list[Float[Tensor, "K B ..."]]:
        """See `Linearisation.pullback`; several columns in one vectorised pass, where torch can vectorise it."""
        if len(columns) > 1 and self._can_vectorise:
            try:
                return self._pull(columns, is_grads_batched=True)
            except torch.OutOfMemoryError:
                self.columns_at_once = max(1, len(columns) // 2)
                return self._pull_in_parts(columns)
            except RuntimeError:  # an operation without a batching rule, such as a custom autograd function
                self._can_vectorise = False
                self.columns_at_once: int = 1
        if len(columns) > 1:
            return self._pull_in_parts(columns)
        return [g[None] for g in self._pull(columns[0])]

    def _pull_in_parts(self, columns: Tensor) -> list[Tensor]:
        parts = [self.pullback(part) for part in columns.split(self.columns_at_once)]
        return [torch.cat(g) for g in zip(*parts, strict=True)]

    def _pull(self, columns: Tensor, **options: Any) -> list[Tensor]:
        options |= {"retain_graph": True, "create_graph": self._differentiable, "allow_unused": True}
        grads = torch.autograd.grad(self._f, self._edges, columns, **options)
        leading = columns.shape[: columns.ndim - self._f.ndim]  # a use that never reaches f has no gradient: zero
        return [
            g if g is not None else columns.new_zeros(*leading, *shape)
            for g, shape in zip(grads, self._output_shapes, strict=True)
        ]

    def stream(self, columns: Float[Tensor, "K N ..."], receive: Receiver, *, is_last: bool = False) -> None:
        """See `Linearisation.stream`; a single column is passed on during the backward pass, and none of it is kept."""
        if len(columns) > 1:
            super().stream(columns, receive)
            return
        waiting = set(range(len(self._edges)))

        def hand_on(number: int, g: Tensor | None) -> None:
            if g is not None:
                waiting.remove(number)
                receive(number, g[None])

        inner, outer = self._inner_and_outer
        handles = [
            self._edges[n].node.register_prehook(_at_output(self._edges[n].output_nr, n, hand_on)) for n in inner
        ]
        try:
            targets = [self._edges[n] for n in outer]
            grads = torch.autograd.grad(self._f, targets, columns[0], retain_graph=not is_last, allow_unused=True)
        finally:
            for handle in handles:
                handle.remove()
        for number, g in zip(outer, grads, strict=True):
            hand_on(number, g)
        for number in sorted(waiting):  # uses that never reach f
            receive(number, columns.new_zeros(1, *self._output_shapes[number]))

    @cached_property
    def _inner_and_outer(self) -> tuple[list[int], list[int]]:
        """Uses that, seen from f, have others behind them, so that the backward pass runs through them; and those where it may end."""
        above = _nodes_above(self._f.grad_fn, {edge.node for edge in self._edges})
        numbers = range(len(self._edges))
        return [n for n in numbers if self._edges[n].node in above], [
            n for n in numbers if self._edges[n].node not in above
        ]


def _at_output(place: int, number: int, hand_on: Callable[[int, Tensor | None], None]) -> Callable[[Any], None]:
    """A hook for the node that makes the output of a use."""
    return lambda grads: hand_on(number, grads[place])


def _nodes_above(root: Any, marked: set[Any]) -> set[Any]:
    """Nodes of an autograd graph from which a backward pass reaches a marked one."""
    above: dict[Any, bool] = {}
    stack = [root]
    while stack:
        node = stack[-1]
        following = [n for n, _ in node.next_functions if n is not None]
        new = [n for n in following if n not in above]
        if node not in above and new:
            stack += new
            continue
        above[node] = any(n in marked or above[n] for n in following)
        stack.pop()
    return {node for node, is_above in above.items() if is_above}


class KeptUse(NamedTuple):
    """A use, where to take gradients at its output, and their shape."""

    use: Use
    edge: GradientEdge
    shape: torch.Size


class UseRecorder(TorchFunctionMode):
    """Records the uses of parameters while active.

    Args:
        parameters: whose uses, by name.
        examples: of the batch.
        differentiable: whether what the uses keep stays in the autograd graph.
        time_first: names of parameters whose calls have the examples along another axis than the first; those that are found are added.

    Attributes:
        examples: of the batch.
        kept: the uses so far.
        unsupported: parameters that are used in a way that has no block, and how, in words.
    """

    def __init__(
        self,
        parameters: Mapping[str, nn.Parameter],
        examples: Examples,
        differentiable: bool = False,
        time_first: set[str] | None = None,
    ):
        super().__init__()
        self._selected = SelectedRows(examples)
        self.time_first: set[str] = set() if time_first is None else time_first
        self._is_moved = False
        self._differentiable = differentiable
        self.kept: list[KeptUse] = []
        self.examples = examples
        self._operands = {id(p): Operand(name, p, p) for name, p in parameters.items()}
        self._computed: list[Operand] = []
        self._computed_further: set[str] = set()
        self.unsupported: dict[str, str] = {}
        self._versions: list[tuple[Use, Tensor, int]] = []

    def __torch_function__(self, func: Callable, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        operands = {
            id(t): self._operands[id(t)] for t in _tensors((*args, *kwargs.values())) if id(t) in self._operands
        }
        if not operands:
            output = func(*args, **kwargs)
            self._selected.follow(func, args, kwargs, output)
            return output
        if func is F.multi_head_attention_forward:
            try:
                return multi_head_attention(self._project, *args, **kwargs)
            except UnreadableCallError as error:
                self._refuse(operands, "multi_head_attention_forward", error)
                return func(*args, **kwargs)
        why: UnreadableCallError | None = None
        if func in REWRITES and any(operand.provisional is None for operand in operands.values()):
            try:
                with self:
                    rewritten = REWRITES[func](self._is_parameter, *args, **kwargs)
                if rewritten is not NotImplemented:
                    return rewritten
            except UnreadableCallError as error:
                why = error
        before = (args[0].clone(), *args[1:]) if func in OVERWRITES_INPUT else args
        output = func(*args, **kwargs)
        if func in READERS and func not in IN_PLACE and isinstance(output, Tensor) and output._is_view():
            output = output.clone()  # a later in-place call on a view would take its gradient edge off the path
        try:
            self._record(func, operands, before, kwargs, output, why)
        except OtherBatchAxisError as error:
            self.time_first |= {name for operand in operands.values() for name in operand.names}
            self._is_moved = True
            try:
                with self:
                    return with_batch_first(func, error.axis, *args, **kwargs)
            finally:
                self._is_moved = False
        self._selected.follow(func, args, kwargs, output)
        return output

    def _is_parameter(self, value: Any) -> bool:
        """Whether a value is, or is computed from, parameters alone; rows that are looked up for each example are data."""
        operand = self._operands.get(id(value))
        return operand is not None and operand.provisional is None

    def _record(
        self,
        func: Callable,
        operands: dict[int, Operand],
        args: Any,
        kwargs: Any,
        output: Any,
        why: UnreadableCallError | None,
    ) -> None:
        """Record the uses that a call makes, or why it has none.

        Raises:
            OtherBatchAxisError: its tensors have the examples of the batch along another axis than the first.
        """
        if not any(t.requires_grad and id(t) not in self._operands for t in _tensors((output,))):
            return  # a shape query, a detached copy, a call without gradient
        first = operands.get(id(args[0])) if args else None
        if first is not None and (parts := first.after(func, output, *args[1:], **kwargs)):
            self._operands |= {id(part.tensor): part for part in parts}
            return
        # looked-up rows that are not added to every example belong to one example each, and are recorded where they were looked up
        read = {
            key: operand
            for key, operand in operands.items()
            if operand.provisional is None or is_added_to_all(operand, func, output)
        }
        if not read:
            return
        name = getattr(func, "__name__", str(func))
        selected = self._selected.of(args, len(output)) if isinstance(output, Tensor) and output.ndim else None
        call = Call(name, read, output, self.examples, self._differentiable, selected)
        axes = [] if self._is_moved else call.other_batch_axes(func, *args)
        is_known = self.examples.n > 1 and any(n in self.time_first for operand in read.values() for n in operand.names)
        try:
            if func is F.embedding and self._look_up(call, *args, **kwargs):
                return
            if is_known and axes:
                raise NoBatchAxisError("along several of whose axes the examples may lie")
            if axes and Examples.rows(self.examples, len(output)) is None:
                raise NoBatchAxisError("whose first axis is not that of the examples")
            uses = read_call(func, call, *args, **kwargs)
        except UnreadableCallError as error:
            if isinstance(error, NoBatchAxisError) and (len(axes) == 1 or (axes and self.examples.n == 1)):
                raise OtherBatchAxisError(axes[0]) from None
            of_data = [t for t in _tensors((*args, *kwargs.values())) if t.requires_grad and id(t) not in operands]
            if of_data or not self._compute(read, output, f"{name}, {why or error}"):
                self._refuse(read, name, why or error)
            return
        self._keep([kept for use in uses for kept in of_parameters(use, read.values())], output)
        for operand in read.values():
            self.kept = [kept for kept in self.kept if kept.use is not operand.provisional]

    def _compute(self, operands: Mapping[int, Operand], output: Any, refused: str) -> bool:
        """Follow what a call computes from parameters alone; returns whether it can be followed."""
        if not isinstance(output, Tensor) or output.is_leaf or any(operand.looked_up for operand in operands.values()):
            return False
        sources: dict[str, Tensor] = {}
        for operand in operands.values():
            sources |= operand.sources or {operand.name: operand.parameter}
        refused = next((operand.refused for operand in operands.values() if operand.refused), refused)
        computed = Operand(f"\0{len(self._computed)}", output, output, sources=sources, refused=refused)
        self._computed.append(computed)
        self._computed_further |= {operand.name for operand in operands.values()}
        self._operands[id(output)] = computed
        return True

    def _look_up(self, call: Call, input: Tensor, weight: Tensor, padding_idx: int | None = None, **rest: Any) -> bool:
        """Follow rows of an embedding that are looked up without a batch axis, as positions are; returns whether the call does so."""
        if self.examples.n == 1 or padding_idx is not None or id(weight) not in call.operands or input.ndim == 0:
            return False
        use = None
        if self.examples.rows(len(input)) is not None:  # as many as examples, or a multiple: perhaps theirs
            (use,) = read_call(F.embedding, call, input, weight, padding_idx, **rest)
            self._keep([use], call.output)
        (rows,) = call.operands[id(weight)].after(torch.Tensor.__getitem__, call.output, input)
        self._operands[id(call.output)] = replace(rows, looked_up=True, provisional=use)
        return True

    def _project(
        self, x: Tensor, weight: Tensor, weight_parts: Parts, bias: Tensor | None, bias_parts: Parts
    ) -> Tensor:
        """A projection of attention, and its uses; see `attention.Project`."""
        y = F.linear(x, take_parts(weight, weight_parts), None if bias is None else take_parts(bias, bias_parts))
        operands = {id(t): self._operands[id(t)] for t in (weight, bias) if id(t) in self._operands}
        if operands:
            call = Call("multi_head_attention_forward", operands, y, self.examples, self._differentiable)
            self._keep(read_projection(call, x, weight, weight_parts, bias, bias_parts), y)
        return y

    def _refuse(self, operands: dict[int, Operand], name: str, error: UnreadableCallError) -> None:
        for operand in operands.values():
            for of_parameter in operand.names:
                self.unsupported.setdefault(of_parameter, operand.refused or f"{name}, {error}")

    def _keep(self, uses: Sequence[Use], output: Tensor) -> None:
        edge = get_gradient_edge(output)
        self.kept += [KeptUse(use, edge, output.shape) for use in uses]
        self._versions += versions(uses)

    def check(self, parameters: Mapping[str, nn.Parameter], f: Tensor) -> None:
        """Raise `UnsupportedParameterError` unless every parameter is covered and every recorded input is unchanged."""
        self._check_computed(f)
        for name, how in self.unsupported.items():
            raise UnsupportedParameterError(f"{name!r} is used by {how}; {FREEZE_OR_WRITE}.")
        covered = {name for kept in self.kept for name in kept.use.parameters}
        missing = {name: p for name, p in parameters.items() if name not in covered}
        rows = self.examples.rows(self.examples.n)
        for name, parameter in missing.items():
            seen = (
                f.requires_grad
                and torch.autograd.grad(f.sum(), parameter, retain_graph=True, allow_unused=True)[0] is not None
            )
            if not seen and self._selected.any and f.requires_grad and rows is not None:  # no example was routed to it
                self._keep([AbsentUse(rows=rows, call="no call", name=name, shape=parameter.shape)], f)
                continue
            why = (
                "reaches the output through a call that cannot be seen from Python"
                if seen
                else "has no gradient (it is not used in the forward pass, or a reentrant checkpoint hides it: use_reentrant=False)"
            )
            raise UnsupportedParameterError(f"{name!r} requires grad but {why}; {FREEZE_HINT}.")
        self.check_unchanged()

    def _check_computed(self, f: Tensor) -> None:
        """Refuse the parameters of what was computed from them alone and reaches the outputs otherwise than by a use."""
        used = {
            kept.use.value_name for kept in self.kept if isinstance(kept.use, ExpressionUse)
        } | self._computed_further
        unused = [computed for computed in self._computed if computed.name not in used]
        if not unused or not f.requires_grad:
            return
        values = [computed.tensor for computed in unused]
        gradients = torch.autograd.grad(f.sum(), values, retain_graph=True, allow_unused=True)
        for computed, gradient in zip(unused, gradients, strict=True):
            if gradient is not None:
                for name in computed.sources:
                    self.unsupported.setdefault(name, computed.refused)

    def check_unchanged(self, kind: type[Use] = Use) -> None:
        """Raise `UnsupportedParameterError` if an input that a use, of one kind or of any, keeps has been overwritten since."""
        check_unchanged([version for version in self._versions if isinstance(version[0], kind)])


def _tensors(values: Iterable[Any]) -> Iterator[Tensor]:
    for value in values:
        if isinstance(value, Tensor):
            yield value
        elif isinstance(value, (list, tuple)):
            yield from _tensors(value)
