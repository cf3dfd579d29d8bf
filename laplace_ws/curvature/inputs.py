"""Batches as users have them: which part is the inputs, how a model is called with them, and which part of its result is the outputs.

A batch is a pair (x, y), a row (x1, x2, …, y), or a mapping with the targets under a key. Inputs that are one tensor, or of a class
of their own with examples (`RaggedInputs`), stay as they are; all others become `StructuredInputs`, so that whatever comes after needs to
know only `len`, slices, `device`, `own_copy` and `call_model`.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator, Mapping, MutableMapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, TypeGuard

import numpy as np
import torch
from torch import Tensor, nn

from laplace_ws.curvature.dtypes import type_mismatch
from laplace_ws.curvature.graph_inputs import GraphInputs, is_geometric
from laplace_ws.curvature.refused import refused_inputs
from laplace_ws.errors import InvalidBatchError
from laplace_ws.kfac.examples import Examples, RaggedInputs, SelectableInputs
from laplace_ws.values import shown


@dataclass(frozen=True)
class BatchKeys:
    """Keys of a batch that is a mapping, as Hugging Face's are.

    Attributes:
        x: the entry that determines the number of examples and the device of the inputs.
        y: the targets.
    """

    x: str = "input_ids"
    y: str = "labels"

    def __post_init__(self) -> None:
        for option, key in (("dict_key_x", self.x), ("dict_key_y", self.y)):
            if not isinstance(key, str) or not key:  # pyright: ignore[reportUnnecessaryIsInstance]
                raise TypeError(f"{option} must be the name of an entry of the batches, got {shown(key)}.")


DEFAULT_KEYS = BatchKeys()


@dataclass(frozen=True, eq=False)
class StructuredInputs:
    """Inputs of a batch that consist of more than one tensor.

    A slice, or `select`, takes examples out of every nested tensor whose leading axis has N entries, and leaves everything else (scalars,
    masks over positions, None, strings) as it is. If a tensor does not hold examples but may have N rows by chance, give it an extra
    leading axis.

    Attributes:
        arguments: what the model is called with.
        n: N, the number of examples.
        device: where they are.
        whole: tensors within that hold no examples, also where a part of the batch has as many examples as they have rows.
    """

    arguments: tuple[Any, ...]
    n: int
    device: torch.device
    whole: tuple[Any, ...] = ()

    def __len__(self) -> int:
        return self.n

    def __getitem__(self, chosen: slice) -> StructuredInputs:
        """Some of the examples."""
        return self._of_leaves(lambda leaf: leaf[chosen], len(range(self.n)[chosen]))

    def select(self, places: Sequence[int]) -> StructuredInputs:
        """The examples at some places, in that order; one may come twice."""
        return self._of_leaves(
            lambda leaf: leaf[places] if isinstance(leaf, Tensor) else leaf.select(places), len(places)
        )

    def _of_leaves(self, part: Callable[[Any], Any], n: int) -> StructuredInputs:
        """The inputs with the n examples that a function takes out of each part that holds examples."""

        whole: list[Any] = []

        def changed(leaf: Any) -> Any:
            if not _holds_examples(leaf):
                return leaf
            if len(leaf) == self.n and not any(leaf is other for other in self.whole):
                return part(leaf)
            whole.append(leaf)
            return leaf

        return StructuredInputs(_changed(self.arguments, changed), n, self.device, tuple(whole))


ModelInputs = Tensor | RaggedInputs | StructuredInputs | GraphInputs
"""What a model is called with, by `call_model`; all have `len`, slices and `device`."""


# ------------------------------------------------------------------ from batches to inputs


def split_batch(batch: object, number: int, keys: BatchKeys = DEFAULT_KEYS) -> tuple[ModelInputs, Tensor]:
    """Inputs and targets of a batch.

    - `(x, y)`: the model is called as `model(x)`; x is a tensor, a mapping, a tuple or list, or has examples of its own, as graphs have.
    - `(x1, x2, …, y)`: it is called as `model(x1, x2, …)`.
    - a mapping: it is called as `model(batch)`, without the targets, so that a model that takes labels too does not compute its own loss
      (laplace-torch leaves them in).
    - a batch of PyTorch Geometric: it is called as `model(batch)`, and the targets are `batch.y`.

    Args:
        batch: the batch.
        number: its number, for messages.
        keys: keys of batches that are mappings.

    Raises:
        InvalidBatchError: the batch is of an unknown form, or it has no targets.
    """
    if isinstance(batch, Mapping):
        if keys.y not in batch:
            raise InvalidBatchError(
                f"batch {number} has no {keys.y!r} among its entries ({', '.join(map(str, batch))}); name the targets by dict_key_y."
            )
        y = batch[keys.y]
        x: Sequence[Any] = [without_targets(batch, keys)]
    elif isinstance(batch, (tuple, list)) and len(batch) > 1:
        *x, y = batch
    elif is_geometric(batch):
        x, y = [batch], targets_of(batch, keys)
    else:
        length = f" of length {len(batch)}" if isinstance(batch, (tuple, list)) else ""
        raise InvalidBatchError(
            "the loader must give pairs (x, y), rows (x1, x2, …, y) or mappings, but batch "
            f"{number} is a {type(batch).__name__}{length}."
        )
    if not isinstance(y, Tensor):
        raise InvalidBatchError(
            f"y of batch {number} is a {type(y).__name__} but must be one tensor, torch.as_tensor(y)."
        )
    check_plain(y, f"y of batch {number}")
    inputs = as_inputs(*x, keys=keys, name=f"x of batch {number}")
    if y.shape[:1] != (len(inputs),):
        found = f"{len(y)} target{'s' if len(y) != 1 else ''}" if y.ndim else "one target without an axis of examples"
        raise InvalidBatchError(
            f"batch {number} holds {len(inputs)} examples, the first axis of x, and {found} in y, {tuple(y.shape)}; give one row of "
            "targets per example, and a single example as x[None] with y[None]."
        )
    return inputs, y


def targets_of(batch: object, keys: BatchKeys = DEFAULT_KEYS) -> object:
    """What a batch has in the place of its targets, without a check; None where it has none."""
    if isinstance(batch, Mapping):
        return batch.get(keys.y)  # pyright: ignore[reportUnknownMemberType, reportUnknownVariableType]
    if is_geometric(batch):
        return getattr(batch, "y", None)
    return batch[-1] if isinstance(batch, (tuple, list)) and batch else None  # pyright: ignore[reportUnknownVariableType]


def without_targets(batch: Mapping[Any, Any], keys: BatchKeys = DEFAULT_KEYS) -> Mapping[Any, Any]:
    """A batch that is a mapping, without its targets, if it has any."""
    return _with_items(batch, {key: value for key, value in batch.items() if key != keys.y})


def as_inputs(*x: Any, keys: BatchKeys = DEFAULT_KEYS, name: str = "x") -> ModelInputs:
    """The inputs of a model that is to be called as `model(*x)`.

    Args:
        *x: one argument or several, each a tensor, a mapping, a tuple or list, or `RaggedInputs`; of several the first determines N.
        keys: keys of mappings.
        name: what to call them in messages.

    Raises:
        InvalidBatchError: they hold no example, or it cannot be determined how many.
    """
    first = x[0]
    if len(x) == 1 and is_geometric(first):
        inputs: ModelInputs = GraphInputs(first)
    elif len(x) == 1 and (isinstance(first, (Tensor, StructuredInputs)) or _is_ragged(first)):
        inputs = first
    else:
        leaf = _that_tells_n(first, keys, name)
        inputs = StructuredInputs(tuple(x), len(leaf), leaf.device)
    if isinstance(inputs, Tensor):
        check_plain(inputs, name)
    if (isinstance(inputs, Tensor) and inputs.ndim == 0) or not len(inputs):
        raise InvalidBatchError("a batch holds no example.")
    return inputs


def check_plain(tensor: Tensor, name: str) -> None:
    """Raise `InvalidBatchError` for a tensor that is sparse, nested or quantised, which cannot be split into examples."""
    if tensor.layout is torch.strided and not tensor.is_quantized and not tensor.is_nested:
        return
    kind, mend = ("quantised", "dequantize()") if tensor.is_quantized else ("sparse", "to_dense()")
    if tensor.is_nested:
        kind, mend = "nested", "to_padded_tensor(0.0)"
    raise InvalidBatchError(f"{name} is a {kind} tensor; give a dense one, for example by {mend}.")


def _that_tells_n(x: Any, keys: BatchKeys, name: str) -> Tensor | RaggedInputs:
    """The part of the inputs whose length is the number of examples."""
    if _holds_examples(x):
        return x
    if isinstance(x, (tuple, list)) and x:
        return _that_tells_n(x[0], keys, name)
    if isinstance(x, Mapping):
        if _holds_examples(x.get(keys.x)):
            return x[keys.x]
        found = [leaf for leaf in leaves(x) if _holds_examples(leaf)]
        if found and len({len(leaf) for leaf in found}) == 1:
            return found[0]
        raise InvalidBatchError(
            f"the entries of {name} ({', '.join(map(str, x))}) do not tell the number of examples; name one that does by dict_key_x."
        )
    raise InvalidBatchError(
        f"{name} must be a tensor of inputs (or a mapping, a tuple or list of them, or a GraphBatch), got a {type(x).__name__}"
        f"{'; make one by torch.as_tensor(x)' if isinstance(x, (np.ndarray, int, float)) else ''}."
    )


def _is_ragged(x: object) -> TypeGuard[RaggedInputs]:
    """Whether x is of a class of its own with examples; tensors have everything that such a class needs, and mappings may too."""
    return isinstance(x, RaggedInputs) and not isinstance(x, (Tensor, Mapping, np.ndarray))


def _holds_examples(x: object) -> TypeGuard[Tensor | RaggedInputs]:
    return x.ndim > 0 if isinstance(x, Tensor) else _is_ragged(x)


def check_devices(device: torch.device, *parts: ModelInputs) -> None:
    """Raise `InvalidBatchError` if parts of a batch, inputs or targets, are not on the model's device."""
    for part in parts:
        if part.device != device:
            raise InvalidBatchError(
                f"the batch is on {part.device} and the model on {device}; move one of them, for example batch.to({str(device)!r})."
            )


# ------------------------------------------------------------------ inputs in use


def call_model(model: nn.Module, x: ModelInputs) -> Tensor:
    """The model's outputs, `[N, ...]`; `logits` where the result is an object or a mapping that has them.

    Raises:
        InvalidBatchError: the result is neither, or torch raised an error as the model does not accept such inputs, or as their floating
            point type differs from that of its parameters. What the model itself raises is passed on.
    """
    try:
        with running(model, x):
            f = (
                model(*x.arguments)
                if isinstance(x, StructuredInputs)
                else model(x.batch if isinstance(x, GraphInputs) else x)
            )
    except (torch.OutOfMemoryError, InvalidBatchError):
        raise
    except (TypeError, AttributeError) as error:
        if not isinstance(x, StructuredInputs):
            raise
        kinds = ", ".join(type(argument).__name__ for argument in x.arguments)
        raise InvalidBatchError(
            f"{type(model).__name__} is called as model({kinds}), which it does not take; wrap it in a "
            "module whose forward does, or let the loader give what it takes."
        ) from error
    except (RuntimeError, ValueError, IndexError) as error:
        refusal = refused_inputs(model, _in_words(x), error)
        if refusal is None:
            raise
        raise refusal from error
    return check_outputs(f, len(x))


@contextmanager
def running(model: nn.Module, x: ModelInputs) -> Iterator[None]:
    """For every run of a model: under autocast with the weights as they are now, and with errors about types in our words.

    Within one region of `torch.autocast`, torch keeps the weights that it has cast, and goes on with them after they have changed. Here
    nothing that was kept is used, nothing is kept, and nothing from before is left to whoever opened the region.

    Raises:
        InvalidBatchError: the types of inputs and parameters do not go together.
    """
    keeps_casts = torch.is_autocast_cache_enabled()
    torch.clear_autocast_cache()
    torch.set_autocast_cache_enabled(False)
    try:
        yield
    except (RuntimeError, ValueError) as error:
        mismatch = type_mismatch(model, leaves(x), str(error))
        if mismatch is None:
            raise
        raise InvalidBatchError(mismatch) from error
    finally:
        torch.set_autocast_cache_enabled(keeps_casts)
        torch.clear_autocast_cache()


def _in_words(x: ModelInputs) -> str:
    """Shapes and types of the inputs."""
    tensors = [leaf for leaf in leaves(x) if isinstance(leaf, Tensor)]
    return ", ".join(f"{tuple(leaf.shape)} of {leaf.dtype}" for leaf in tensors) or type(x).__name__


def check_outputs(f: object, n_examples: int) -> Tensor:
    """The outputs in what a model returned.

    Raises:
        InvalidBatchError: they are not a floating point tensor with one row per example.
    """
    logits = outputs_in(f)
    if not isinstance(logits, Tensor) or not logits.is_floating_point():
        what = f"one of {logits.dtype}" if isinstance(logits, Tensor) else type(f).__name__
        raise InvalidBatchError(
            f"the model must return one floating point tensor (or an object with one as its logits), but it returned {what}."
        )
    check_plain(logits, "what the model returns")
    if logits.ndim == 0 or len(logits) != n_examples:
        raise InvalidBatchError(
            f"the model must return one row of outputs for each of the {n_examples} examples, but it returned shape "
            f"{tuple(logits.shape)}."
        )
    return logits


def outputs_in(f: object) -> object:
    """The part of what a model returned that is its outputs: `logits`, if there are any."""
    return f["logits"] if isinstance(f, Mapping) and "logits" in f else getattr(f, "logits", f)


def own_copy(x: ModelInputs) -> ModelInputs:
    """Inputs for a model that may change them in place, so that they are unchanged when they are used again."""
    if isinstance(x, StructuredInputs):
        return StructuredInputs(_changed(x.arguments, own_copy), x.n, x.device)
    return x.clone() if isinstance(x, (Tensor, GraphInputs)) else x


def selected(x: ModelInputs, places: Sequence[int]) -> ModelInputs:
    """The examples at some places, in that order; one may come twice.

    Where inputs are, or hold, examples of a class without a method `select`, as many of the first ones instead.
    """
    if any(_is_ragged(leaf) and not isinstance(leaf, SelectableInputs) for leaf in leaves(x)):
        return x[: len(places)]
    return x[list(places)] if isinstance(x, Tensor) else x.select(places)  # type: ignore[union-attr]


def examples_of(x: ModelInputs) -> Examples:
    """The examples of a batch; in tensors, all have the same number of rows."""
    if isinstance(x, GraphInputs):
        return x.examples
    return Examples(len(x), are_ragged=any(_is_ragged(leaf) for leaf in leaves(x)))


def leaves(x: Any) -> Iterator[Any]:
    """The values within inputs that are not mappings, tuples or lists."""
    found: list[Any] = []
    _changed(x.arguments if isinstance(x, StructuredInputs) else x, found.append)
    yield from found


def _changed(value: Any, change: Callable[[Any], Any]) -> Any:
    """A copy of nested mappings, tuples and lists, with `change` applied to every value within."""
    if isinstance(value, Mapping):
        return _with_items(value, {key: _changed(item, change) for key, item in value.items()})
    if isinstance(value, tuple) and hasattr(value, "_fields"):
        return type(value)(*(_changed(item, change) for item in value))
    if isinstance(value, (tuple, list)):
        return type(value)(_changed(item, change) for item in value)
    return change(value)


def _with_items(mapping: Mapping[Any, Any], items: dict[Any, Any]) -> Mapping[Any, Any]:
    """A mapping of the same class with other items: a model may read `batch.input_ids` of a class that has it."""
    if not isinstance(mapping, MutableMapping):
        return items
    other = copy.copy(mapping)
    other.clear()
    other.update(items)
    return other
