"""The structure of a model: what a copy that shares its tensors needs, and what shows whether it is still the same."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from copy import copy
from dataclasses import dataclass
from typing import Any

from backpack import hook_store_io
from torch import nn


def is_left_by_backpack(module: nn.Module, attribute: str) -> bool:
    """Whether an attribute of a module is one that BackPACK sets on the modules that it extends."""
    if "_backpack_extend" not in vars(module):
        return False
    return attribute in ("output", "_backpack_extend") or (attribute[:5] == "input" and attribute[5:].isdecimal())


def copy_structure(value: Any, copies: dict[int, Any] | None = None) -> Any:
    """Copy a module with the modules and containers in it, without hooks; everything else, tensors above all, is shared."""
    copies = {} if copies is None else copies
    if id(value) in copies:
        return copies[id(value)]
    if isinstance(value, nn.Module):
        twin = copies[id(value)] = object.__new__(type(value))
        hooks = {name: item for name, item in vars(nn.Module()).items() if "hook" in name}
        for name, item in vars(value).items():
            if not is_left_by_backpack(value, name):
                vars(twin)[name] = hooks[name] if name in hooks else copy_structure(item, copies)
        return twin
    if type(value) in (list, tuple, set):
        return type(value)(copy_structure(item, copies) for item in value)
    if isinstance(value, dict):
        twin = copies[id(value)] = copy(value)
        twin.update((key, copy_structure(item, copies)) for key, item in value.items())
        return twin
    if inspect.ismethod(value) and isinstance(value.__self__, nn.Module):
        return value.__func__.__get__(copy_structure(value.__self__, copies))
    return value


def model_hooks(module: nn.Module) -> list[Callable[..., Any]]:
    """Forward hooks of a module that are not BackPACK's."""
    return [hook for hook in module._forward_hooks.values() if hook is not hook_store_io]


@dataclass(frozen=True, eq=False)
class _Same:
    """Equal to any instance that holds the same object."""

    value: Any

    def __eq__(self, other: object) -> bool:
        return isinstance(other, _Same) and self.value is other.value


def model_state(model: nn.Module) -> list[Any]:
    """What a trace of a model depends on: its modules, their plain attributes, and which tensors they hold."""
    hooks = {name for name in vars(nn.Module()) if "hook" in name}
    return [
        (
            id(module),
            type(module),
            [(k, _frozen(v)) for k, v in vars(module).items() if k not in hooks and not is_left_by_backpack(module, k)],
            [_Same(hook) for hook in (*model_hooks(module), *module._forward_pre_hooks.values())],
        )
        for module in model.modules()
    ]


def _frozen(value: Any) -> Any:
    if value is None or isinstance(value, (bool, int, float, str)):
        return value
    if isinstance(value, nn.Module):
        return id(value)
    if type(value) in (list, tuple):
        return [_frozen(item) for item in value]
    if isinstance(value, dict):
        return [(_frozen(key), _frozen(item)) for key, item in value.items()]
    return _Same(value)
