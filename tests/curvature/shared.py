"""What the tests of the backends share."""

import torch
from backpack import disable
from backpack.context import CTX
from torch import nn

from laplace_ws.curvature.backend import trainable_parameters


def close(estimate, truth):
    """Equal to 1e-10 of the largest entry."""
    torch.testing.assert_close(estimate, truth, rtol=1e-10, atol=1e-10 * truth.abs().max().item())


def pulled(backend, model, x, columns, at_once=None):
    """Columns, made from the outputs, at the output of each use."""
    with backend.linearise(model, x, trainable_parameters(model)) as linearisation:
        chunks = columns(linearisation.outputs).split(at_once or linearisation.columns_at_once)
        return [torch.cat(g) for g in zip(*map(linearisation.pullback, chunks), strict=True)]


def snapshot_with_backpack(model):
    """All that a backend could leave on a model, in BackPACK or in torch."""
    modules = list(model.modules())
    return {
        "attributes": [{k: id(v) for k, v in vars(m).items()} for m in modules],
        "plain": [{k: v for k, v in vars(m).items() if isinstance(v, (bool, int, float))} for m in modules],
        "hooks": [[list(v.values()) for k, v in sorted(vars(m).items()) if k.endswith("_hooks")] for m in modules],
        "parameters": [
            (id(p), id(p.grad), p.requires_grad, sorted(vars(p)), p._backward_hooks) for p in model.parameters()
        ],
        "state": [(id(v), v._version, v.tolist()) for v in model.state_dict(keep_vars=True).values()],
        "rng": torch.get_rng_state().tolist(),
        "BackPACK": (
            list(CTX.hook_handles),
            CTX.active_exts,
            CTX.debug,
            CTX.extension_hook,
            CTX.retain_graph,
            disable.store_io,
        ),
        "torch": (vars(torch.autograd.Function)["apply"], torch.arange, torch.nn.Module.__call__),
    }


class Wrapped(nn.Module):
    """A module with the given attributes and forward."""

    def __init__(self, forward, **parameters):
        super().__init__()
        for name, value in parameters.items():
            setattr(self, name, value)
        self._forward = forward

    def forward(self, x):
        return self._forward(self, x)


def weight(*shape):
    """A parameter of a shape."""
    return nn.Parameter(torch.randn(*shape))
