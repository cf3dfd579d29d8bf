"""Products of the Jacobian of a model's outputs with vectors over its parameters, for every model that can be differentiated twice."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from jaxtyping import Float
from torch import Tensor, nn

from laplace_ws.curvature.forward import outputs_with_gradient, precision
from laplace_ws.curvature.inputs import ModelInputs

_TF32_EPS = 2**-10


class JacobianProducts:
    """J v for one vector after another, from one linearisation.

    Jᵀ u is linear in u, so J v is the derivative of ⟨Jᵀ u, v⟩ in u. The J is then the one that backward passes give, also where a model
    detaches a part of its outputs, defines gradients of its own, or reads a parameter from elsewhere than its module. Dual numbers
    (`torch.func.jvp`) promise none of this, and need a formula for every operation. A product takes about one training step either way.

    Args:
        f: outputs of a model, with their graph.
        parameters: by which they are differentiated.

    Attributes:
        outputs: f, detached.

    Raises:
        RuntimeError: here or in a product, where an operation cannot be differentiated twice.
    """

    def __init__(self, f: Float[Tensor, "N ..."], parameters: Sequence[Tensor]):
        self.outputs: Float[Tensor, "N ..."] = f.detach()
        self._u = torch.zeros_like(f, requires_grad=True)
        gradients = torch.autograd.grad(f, parameters, self._u, create_graph=True, allow_unused=True)
        self._of_parameters = [(i, g) for i, g in enumerate(gradients) if g is not None and g.requires_grad]

    def __call__(self, vector: Sequence[Tensor]) -> Float[Tensor, "N ..."]:
        """J v, for a v in the shapes and types of the parameters."""
        if not self._of_parameters:
            return torch.zeros_like(self.outputs)
        gradients = [g for _, g in self._of_parameters]
        tangents = [vector[i] for i, _ in self._of_parameters]
        return torch.autograd.grad(gradients, self._u, tangents, retain_graph=True)[0]


def can_push_forward(model: nn.Module, x: ModelInputs, parameters: Sequence[Tensor]) -> bool:
    """Whether `JacobianProducts` gives the Jacobian of backward passes on some examples.

    It does not where an operation has no second derivative, or its backward pass hides what it does from autograd. The caller sets the
    modes of the model.
    """
    f = outputs_with_gradient(model, x)
    with torch.autocast(f.device.type, enabled=False):
        generator = torch.Generator(f.device).manual_seed(0)
        u = torch.randn(f.shape, dtype=torch.float32, device=f.device, generator=generator).to(f.dtype)
        pulled = torch.autograd.grad(f, parameters, u, retain_graph=True, allow_unused=True, materialize_grads=True)
        norms = [torch.linalg.vector_norm(g, dtype=torch.float64) for g in pulled]
        # every parameter counts by the size of its gradient: ⟨u, J v⟩ is then the sum of the norms
        vector = [(g / norm.clamp_min(1e-30)).to(g.dtype) for g, norm in zip(pulled, norms, strict=True)]
        try:
            pushed = JacobianProducts(f, parameters)(vector)
        except torch.OutOfMemoryError:
            raise
        except RuntimeError:
            return False
    expected = torch.stack(norms).sum()
    eps = precision(f, parameters)
    if f.device.type == "cuda":
        eps = max(eps, _TF32_EPS)
    return bool(((u.double() * pushed.double()).sum() - expected).abs() <= eps**0.5 * expected)
