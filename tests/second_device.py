"""A second device, simulated for machines that have none: tensors on it meet no tensor of the CPU, and every wait for it is counted.

`register()` makes the device `simulated` known to torch through its Python backend for PrivateUse1 (torch 2.14; experimental there).
A tensor on it wraps one of the CPU, where its operations are done, in the same order and from the same random numbers: results
equal those of the CPU to the last bit. What it adds is what a GPU would: an error where tensors of two devices meet, or where a
generator is of another device than the draw, and a count of what makes the CPU wait or copies between the two.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import wraps
from types import SimpleNamespace
from typing import Any, ClassVar
from weakref import WeakValueDictionary

import torch
from torch.utils import backend_registration
from torch.utils._pytree import tree_map_only

NAME = "simulated"
CPU = torch.device("cpu")

WAITING = {
    "aten::_linalg_check_errors",
    "aten::_local_scalar_dense",
    "aten::_unique2",
    "aten::bincount",
    "aten::equal",
    "aten::masked_select",
    "aten::nonzero",
    "aten::repeat_interleave",
    "aten::unique_consecutive",
    "aten::unique_dim",
}
"""Operations for whose result the CPU waits, as it does with CUDA; so do copies to the CPU and indexing by a mask."""

INDEXING = {
    "aten::index",
    "aten::_unsafe_index",
    "aten::index_put",
    "aten::index_put_",
    "aten::_index_put_impl_",
    "aten::_unsafe_index_put",
}
"""Operations that take indices on the CPU for a tensor on the device."""

TAKING_SCALARS = INDEXING | {"aten::fill_", "aten::fill", "aten::masked_fill", "aten::masked_fill_", "aten::index_fill"}
"""Operations, besides the pointwise ones, that take a tensor of no dimension from the CPU."""

counts: Counter[str] = Counter()
"""What has happened since the start: "wait: …" by operation, "copy from the CPU"."""


def why_not() -> str | None:
    """Why this torch cannot have the device, or None where it can."""
    if hasattr(backend_registration, "_setup_privateuseone_for_python_backend"):
        return None
    return f"torch {torch.__version__} makes no device in Python (seen in 2.14): no _setup_privateuseone_for_python_backend"


@contextmanager
def counted() -> Iterator[Counter[str]]:
    """Counts what happens inside; complete once the block has ended."""
    before, inside = counts.copy(), Counter()
    yield inside
    inside.update(counts - before)


def waits(counted: Counter[str]) -> int:
    """How often the CPU waited for the device."""
    return sum(number for what, number in counted.items() if what.startswith("wait: "))


# ------------------------------------------------------------------ tensors


class SecondTensor(torch.Tensor):
    """A tensor on the device; `raw` holds its numbers on the CPU."""

    raw: torch.Tensor
    __torch_function__ = torch._C._disabled_torch_function_impl

    @staticmethod
    def __new__(cls, raw: torch.Tensor) -> SecondTensor:
        self = torch.Tensor._make_wrapper_subclass(
            cls,
            raw.shape,
            strides=raw.stride(),
            storage_offset=raw.storage_offset(),
            dtype=raw.dtype,
            device=torch.device(NAME, 0),
        )
        self.raw = raw
        return self

    def __repr__(self, *, tensor_contents: Any = None) -> str:
        return f"{self.raw!r} on {NAME}"

    @classmethod
    def __torch_dispatch__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return _run(func, args, kwargs or {})

    @property
    def data(self) -> torch.Tensor:
        return SecondTensor(self.raw.detach())  # with a version counter of its own

    @data.setter
    def data(self, new: SecondTensor) -> None:
        torch.Tensor.data.__set__(self, new)
        self.raw = new.raw

    def __getitem__(self, index: Any) -> torch.Tensor:
        return super().__getitem__(_index(index))

    def __setitem__(self, index: Any, value: Any) -> None:
        super().__setitem__(_index(index), value)

    def data_ptr(self) -> int:
        return self.raw.data_ptr()

    def untyped_storage(self) -> torch.UntypedStorage:
        return self.raw.untyped_storage()

    def tolist(self) -> Any:
        return self.cpu().tolist()

    def __deepcopy__(self, memo: dict[int, Any]) -> SecondTensor:
        if id(self) not in memo:
            copied = memo[id(self)] = SecondTensor(self.raw.clone()).requires_grad_(self.requires_grad)
            copied.__dict__ |= {key: value for key, value in vars(self).items() if key != "raw"}
            if self.grad is not None:
                copied.grad = self.grad.clone()
        return memo[id(self)]

    def __reduce_ex__(self, protocol: Any) -> Any:
        arguments = (self.detach().cpu(), self.dtype, str(self.device), self.requires_grad)
        return torch._utils._rebuild_device_tensor_from_cpu_tensor, arguments

    def __tensor_flatten__(
        self,
    ) -> tuple[list[str], None]:  # makes `module.to` swap tensors, which keeps ties and `raw` right
        return ["raw"], None

    @staticmethod
    def __tensor_unflatten__(inner: dict[str, torch.Tensor], *rest: Any) -> SecondTensor:
        return SecondTensor(inner["raw"])


def _index(index: Any) -> Any:
    """Lists of places as tensors on the device, which torch would make itself on another one."""
    if isinstance(index, tuple):
        return tuple(map(_index, index))
    return torch.tensor(list(index), device=NAME) if isinstance(index, (list, range)) else index


def _leaves(values: Any) -> Iterator[Any]:
    for value in values:
        if isinstance(value, (list, tuple)):
            yield from _leaves(value)
        else:
            yield value


def _run(func: Any, args: Any, kwargs: dict[str, Any]) -> Any:
    """Do an operation on the wrapped tensors, after the checks and counts of a device of its own."""
    name = func._schema.name
    here, elsewhere = [], []
    for value in _leaves((args, tuple(kwargs.values()))):
        if isinstance(value, torch.Tensor):
            (here if isinstance(value, SecondTensor) else elsewhere).append(value)
        elif isinstance(value, torch.Generator) and value._cdata not in SecondGenerator.known:
            raise RuntimeError(f"Expected a '{NAME}' device type for generator but found '{value.device.type}'")
    if name == "aten::copy_":
        return _copy(*args)
    target = kwargs.get("device")
    result_is_here = bool(here) if target is None else torch.device(target).type == NAME
    if name == "aten::_to_copy":
        if here and not result_is_here:
            counts[f"wait: copy of {tuple(args[0].shape)} to {target}"] += 1
        elif elsewhere and result_is_here:
            counts["copy from the CPU"] += 1
    else:
        _check_meeting(func, name, args, here, elsewhere)
        masks = name in INDEXING and any(isinstance(i, torch.Tensor) and i.dtype is torch.bool for i in args[1])
        if name in WAITING or masks:
            counts[f"wait: {name}"] += 1
    if target is not None:
        kwargs = kwargs | {"device": CPU if result_is_here else target}
    output = func(*_raw(args), **{key: _raw(value) for key, value in kwargs.items()})
    return _wrapped(output, {id(t.raw): t for t in here}) if result_is_here else output


def _copy(to: torch.Tensor, source: torch.Tensor, non_blocking: bool = False) -> torch.Tensor:
    """`to.copy_(source)`, the one operation in which two devices may meet."""
    if isinstance(source, SecondTensor) and not isinstance(to, SecondTensor):
        counts[f"wait: copy of {tuple(source.shape)} to {to.device}"] += 1
    elif isinstance(to, SecondTensor) and not isinstance(source, SecondTensor):
        counts["copy from the CPU"] += 1
    _raw(to).copy_(_raw(source))
    return to


def _check_meeting(func: Any, name: str, args: Any, here: list[Any], elsewhere: list[Any]) -> None:
    if not here or not elsewhere:
        return
    takes_scalars = torch.Tag.pointwise in func.tags or name in TAKING_SCALARS
    if name in INDEXING and isinstance(args[0], SecondTensor):
        indices = list(_leaves((args[1],)))
        elsewhere = [t for t in elsewhere if not any(t is index for index in indices)]
    writes_elsewhere = func._schema.is_mutable and not isinstance(args[0], (SecondTensor, list, tuple))
    wrong = [t for t in elsewhere if writes_elsewhere or t.ndim > 0 or not takes_scalars]
    if wrong:
        shapes = (
            f"{[tuple(t.shape) for t in here]} on {NAME} and {[tuple(t.shape) for t in wrong]} on {wrong[0].device}"
        )
        raise RuntimeError(f"Expected all tensors to be on the same device, but {name} got {shapes}")


def _raw(value: Any) -> Any:
    if isinstance(value, SecondTensor):
        return value.raw
    if isinstance(value, (list, tuple)):
        return type(value)(map(_raw, value))
    return value


def _wrapped(output: Any, known: dict[int, SecondTensor]) -> Any:
    if isinstance(output, torch.Tensor):
        if id(output) not in known:
            return SecondTensor(output)
        same = known[id(output)]
        if same.shape != output.shape or same.stride() != output.stride():  # as `squeeze_` does
            same.data = SecondTensor(output)
        return same
    if isinstance(output, (list, tuple)):
        return type(output)(_wrapped(value, known) for value in output)
    return output


# ------------------------------------------------------------------ what torch does not let a device in Python do


class SecondGenerator(torch.Generator):
    """A generator of the device; its numbers are those of one of the CPU."""

    known: ClassVar[WeakValueDictionary[int, SecondGenerator]] = (
        WeakValueDictionary()
    )  # torch hands operations a bare one

    def __init__(self) -> None:
        super().__init__()
        self.known[self._cdata] = self

    @property
    def device(self) -> torch.device:
        return torch.device(NAME, 0)


def is_second(device: torch.device | str | int | None) -> bool:
    """Whether this names the device."""
    return isinstance(device, (str, torch.device)) and torch.device(device).type == NAME


def replaced(original: type, make: Callable[..., Any]) -> type:
    """A class whose instances are made by `make`, and that knows those of `original` as its own."""

    class Meta(type):
        def __call__(cls, *args: Any, **kwargs: Any) -> Any:
            return make(*args, **kwargs)

        def __instancecheck__(cls, instance: Any) -> bool:
            return isinstance(instance, original)

    return Meta(original.__name__, (), {})


def _constructor(original: Callable[..., torch.Tensor]) -> Callable[..., torch.Tensor]:
    """`torch.tensor` or `torch.as_tensor`, which torch cannot make on such a device itself."""

    @wraps(original)
    def construct(data: Any, *, requires_grad: bool = False, device: Any = None, **options: Any) -> torch.Tensor:
        if not is_second(device):
            return original(data, device=device, **options | ({"requires_grad": True} if requires_grad else {}))
        if not isinstance(data, SecondTensor):
            data = original(data, **options)
        placed = data.to(device=NAME, dtype=options.get("dtype"))
        return placed.requires_grad_() if requires_grad else placed

    return construct


def _generator(original: type) -> Callable[..., torch.Generator]:
    return lambda device="cpu": SecondGenerator() if is_second(device) else original(device)


def _load(original: Callable[..., Any]) -> Callable[..., Any]:
    @wraps(original)
    def load(file: Any, map_location: Any = None, **options: Any) -> Any:
        if not is_second(map_location):
            return original(file, map_location=map_location, **options)
        return tree_map_only(torch.Tensor, lambda t: t.to(NAME), original(file, map_location=CPU, **options))

    return load


def register() -> None:
    """Make the device known to torch, for the rest of the process.

    Raises:
        RuntimeError: this torch cannot have it; see `why_not`.
    """
    if (reason := why_not()) is not None:
        raise RuntimeError(reason)
    module = SimpleNamespace(
        current_device=lambda: 0,
        device_count=lambda: 1,
        get_amp_supported_dtype=lambda: [torch.bfloat16, torch.float16],
        is_available=lambda: True,
        is_initialized=lambda: True,
        manual_seed_all=lambda seed: None,
        synchronize=lambda device=None: None,
        _is_in_bad_fork=lambda: False,
    )
    backend_registration._setup_privateuseone_for_python_backend(NAME, backend_module=module)
    library = torch.library.Library("_", "IMPL")
    library.fallback(lambda func, *args, **kwargs: _run(func, args, kwargs), dispatch_key="PrivateUse1")
    library.fallback(torch.library.fallthrough_kernel, dispatch_key="AutocastPrivateUse1")  # autocast changes nothing
    register.kept = library  # it ends with its last reference
    torch.tensor, torch.as_tensor = _constructor(torch.tensor), _constructor(torch.as_tensor)
    SecondTensor.new_tensor = lambda self, data, **options: torch.tensor(
        data, **{"dtype": self.dtype, "device": self.device} | options
    )
    torch.Generator, torch.load = replaced(torch.Generator, _generator(torch.Generator)), _load(torch.load)
