"""Random states, so that draws can be repeated."""

from __future__ import annotations

import torch
from torch import Tensor

State = dict[str, Tensor]


def random_state(device: torch.device, generator: torch.Generator | None = None) -> State:
    """The state of a generator; if none is given, of torch's global generators that a computation on `device` draws from."""
    if generator is not None:
        return {"generator": generator.get_state()}
    state = {"cpu": torch.get_rng_state()}
    if device.type == "cuda":
        state["cuda"] = torch.cuda.get_rng_state(device)
    return state


def set_random_state(state: State, device: torch.device, generator: torch.Generator | None = None) -> None:
    """Restore what `random_state` returned for the same generator."""
    if generator is not None:
        generator.set_state(state["generator"].cpu())
        return
    torch.set_rng_state(state["cpu"].cpu())
    if "cuda" in state:
        torch.cuda.set_rng_state(state["cuda"].cpu(), device)
