"""Checkpoint files, and the state of the model and the process that a run restores."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from laplace_ws.files import FileFormatError, load_tensors, save_tensors
from laplace_ws.randomness import random_state_kept
from laplace_ws.threads import alone_with

FORMAT_VERSION = 1
_SETTINGS_TO_NAME = 4


class CheckpointError(RuntimeError):
    """A checkpoint cannot be read, or belongs to another run."""


def save_checkpoint(path: Path, state: dict[str, Any]) -> None:
    """Write `state` (tensors and primitives) so that `path` is always a complete file: the old one or the new one."""
    save_tensors(path, {"format_version": FORMAT_VERSION, **state})


def load_checkpoint(path: Path, map_location: torch.device | str = "cpu") -> dict[str, Any]:
    """Read what `save_checkpoint` wrote; runs no code from the file.

    Raises:
        CheckpointError: the file is damaged, or is not a checkpoint in this format.
    """
    try:
        state = load_tensors(path, "a checkpoint", map_location)
    except FileFormatError as error:
        raise CheckpointError(f"{str(error).rstrip('.')}; remove it to start afresh") from error
    if state.get("format_version") != FORMAT_VERSION:
        raise CheckpointError(f"'{path}' is not a checkpoint of format {FORMAT_VERSION}; remove it to start afresh")
    return state


def check_settings(path: Path, found: dict[str, Any], wanted: dict[str, Any]) -> None:
    """Refuse to resume from a checkpoint made under other settings.

    Raises:
        CheckpointError: names the settings that differ.
    """
    differing = [sentence for key in wanted for sentence in differences(key, found.get(key), wanted[key])]
    if differing:
        listed = ", ".join(differing[:_SETTINGS_TO_NAME])
        more = f", and {len(differing) - _SETTINGS_TO_NAME} more" if len(differing) > _SETTINGS_TO_NAME else ""
        raise CheckpointError(
            f"'{path}' belongs to a run with other settings ({listed}{more}); remove it or set them back"
        )


def differences(key: str, found: Any, wanted: Any) -> list[str]:
    """What differs, as "key was … and is …"; nested settings are compared entry by entry."""
    if isinstance(found, dict) and isinstance(wanted, dict):
        keys = dict.fromkeys([*wanted, *found])
        return [s for k in keys for s in differences(f"{key}.{k}", found.get(k), wanted.get(k))]
    return [] if found == wanted else [f"{key} was {found!r} and is {wanted!r}"]


def snapshot(module: nn.Module) -> dict[str, Any]:
    """A copy of a module's `state_dict` that later training leaves alone."""
    with alone_with(module):
        return {
            key: value.detach().clone() if isinstance(value, Tensor) else copy.deepcopy(value)
            for key, value in module.state_dict().items()
        }


@contextmanager
def left_as_found(model: nn.Module, device: torch.device) -> Iterator[None]:
    """Restore the mode of every module, every `.grad` and the global random state on exit, also after an exception."""
    with alone_with(model):  # another thread may have it in eval mode for a while
        modes = [(module, module.training) for module in model.modules()]
    grads = [(parameter, parameter.grad) for parameter in model.parameters()]
    try:
        with random_state_kept(device):
            yield
    finally:
        with alone_with(model):
            for module, training in modes:
                module.training = training
        for parameter, grad in grads:
            parameter.grad = grad
