"""What a network is made of, so that what was found of it can be kept until that changes."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn

_PLAIN = frozenset((bool, int, float, str, type(None)))
_OF_TORCH = frozenset(("training", "_parameters", "_modules", "_buffers"))


@dataclass(frozen=True)
class Anatomy:
    """What a network is made of, as far as that determines how parameters are used.

    Attributes:
        facts: identity and plain settings of every module, identity and kind of every covered parameter.
        held: the objects with these identities, kept alive so that no new object can take them over.
    """

    facts: tuple[Any, ...]
    held: tuple[Any, ...]

    @classmethod
    def of(cls, model: nn.Module, parameters: Mapping[str, nn.Parameter]) -> Anatomy:
        """What a network is made of now.

        Args:
            model: the network.
            parameters: those that are covered, by name.
        """
        modules = tuple(model.modules())
        facts: list[Any] = []
        held: list[Any] = [modules, tuple(parameters.values())]
        for module in modules:
            facts.append((id(module), id(type(module))))
            _add_attributes(module, facts, held)
        facts += [(name, id(p), p.shape, p.dtype, p.device) for name, p in parameters.items()]
        return cls(tuple(facts), tuple(held))


def _add_attributes(module: nn.Module, facts: list[Any], held: list[Any]) -> None:
    """Add what decides how a module works: plain attributes, such as a stride, by their value; hooks, functions and other objects by
    identity, for which they are held; of buffers, whether they are there.
    """
    for name, value in vars(module).items():
        if name in _OF_TORCH:
            continue
        kind = type(value)
        if kind in _PLAIN or (kind is tuple and all(type(part) in _PLAIN for part in value)):
            facts.append((name, value))
        elif name.endswith("_hooks") and isinstance(value, dict):
            if value:
                facts.append((name, *map(id, value.values())))
                held.extend(value.values())
        elif not isinstance(value, Tensor) and not (kind is tuple and any(isinstance(part, Tensor) for part in value)):
            facts.append((name, id(value)))
            held.append(value)
    if module._buffers:
        facts.append(tuple(name for name, buffer in module._buffers.items() if buffer is not None))
