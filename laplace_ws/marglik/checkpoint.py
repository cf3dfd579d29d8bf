"""Checkpoint files, and the state of the model and the process that a run restores."""

from __future__ import annotations

import copy
from collections.abc import Collection, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from laplace_ws.files import FileFormatError, load_tensors, save_tensors
from laplace_ws.marglik.checkpoint_checks import check_fields
from laplace_ws.randomness import random_state_kept
from laplace_ws.threads import alone_with

FORMAT_VERSION = 1
_SETTINGS_TO_NAME = 4


SAFE_TO_CHANGE = ("optimizer_kwargs.lr", "max_grad_norm", "lr_hyp", "max_log_step")
"""Settings with which a training that diverged may go on at other values; the weights so far do not contradict them."""


class CheckpointError(RuntimeError):
    """A checkpoint cannot be read, or belongs to another run."""


def save_checkpoint(path: Path, state: dict[str, Any]) -> None:
    """Write `state` (tensors and primitives) so that `path` is always a complete file: the old one or the new one."""
    save_tensors(path, {"format_version": FORMAT_VERSION, **state})


def load_checkpoint(path: Path) -> dict[str, Any]:
    """Read what `save_checkpoint` wrote, to the CPU; runs no code from the file.

    Raises:
        FileNotFoundError: there is no such file.
        CheckpointError: the file is damaged, or is not a checkpoint in this format.
    """
    try:
        state = load_tensors(path, "a checkpoint")
    except FileFormatError as error:
        raise CheckpointError(f"{str(error).rstrip('.')}; remove it to start afresh") from error
    if state.get("format_version") != FORMAT_VERSION:
        raise CheckpointError(f"'{path}' is not a checkpoint of format {FORMAT_VERSION}; remove it to start afresh")
    return state


def load_training(path: Path) -> dict[str, Any]:
    """Read the checkpoint of a training: that it has every field, and of its type, is checked.

    Raises:
        FileNotFoundError: there is no such file.
        CheckpointError: the file is damaged, or is no checkpoint of a training.
    """
    state = load_checkpoint(path)
    with refused_by_name(path):
        check_fields(state)
    return state


@contextmanager
def refused_by_name(path: Path) -> Iterator[None]:
    """Turn what is wrong with the state that a checkpoint holds into an error that names the file."""
    try:
        yield
    except FileFormatError as error:
        raise CheckpointError(f"'{path}': {str(error).rstrip('.')}; remove it to start afresh") from error


def check_settings(
    path: Path, found: dict[str, Any], wanted: dict[str, Any], may_differ: Collection[str] = ()
) -> dict[str, tuple[Any, Any]]:
    """Refuse to resume from a checkpoint made under other settings.

    Args:
        path: of the file with those that were found, for the message.
        found: the settings of the run so far; nested ones are compared entry by entry.
        wanted: the settings that it is to go on with.
        may_differ: dotted keys of settings that may have changed.

    Returns:
        Those that have, with what they were and are.

    Raises:
        CheckpointError: names the settings that differ.
    """
    changed = {k: v for key in wanted for k, v in differences(key, found.get(key), wanted[key]).items()}
    differing = [f"{key} was {was!r} and is {now!r}" for key, (was, now) in changed.items() if key not in may_differ]
    if differing:
        listed = ", ".join(differing[:_SETTINGS_TO_NAME])
        more = f", and {len(differing) - _SETTINGS_TO_NAME} more" if len(differing) > _SETTINGS_TO_NAME else ""
        raise CheckpointError(
            f"'{path}' belongs to a run with other settings ({listed}{more}); remove it or set them back"
        )
    return changed


def differences(key: str, found: Any, wanted: Any) -> dict[str, tuple[Any, Any]]:
    """What differs, by dotted key."""
    if isinstance(found, dict) and isinstance(wanted, dict):
        keys = dict.fromkeys([*wanted, *found])
        return {
            k: v for name in keys for k, v in differences(f"{key}.{name}", found.get(name), wanted.get(name)).items()
        }
    return {} if found == wanted else {key: (found, wanted)}


def may_change(state: Mapping[str, Any], n_epochs: int) -> bool:
    """Whether the training that left a checkpoint diverged, or has no epoch left that a change would concern."""
    return state.get("diverged", False) or state["progress"]["epoch"] == n_epochs


def copied(state: Any) -> Any:
    """A nested state that later training leaves alone: dictionaries, lists and tensors are copied."""
    if isinstance(state, Tensor):
        return state.detach().clone()
    if isinstance(state, dict):
        return {key: copied(value) for key, value in state.items()}
    return [copied(value) for value in state] if isinstance(state, list) else state


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
