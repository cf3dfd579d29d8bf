"""Small networks and plain references for the canaries."""

import torch
import torch.nn.functional as F
from torch import nn

LABELS = torch.tensor([0, 1, 2, 0])


class Twice(nn.Module):
    def __init__(self, **kwargs):
        super().__init__()
        self.lin = nn.Linear(3, 3, **kwargs)

    def forward(self, x):
        return self.lin(torch.tanh(self.lin(x)))


class Then(nn.Module):
    """A layer, an in-place ReLU, and what the test has of its own."""

    def __init__(self, then):
        super().__init__()
        self.lin, self.relu, self._then = nn.Linear(3, 3), nn.ReLU(inplace=True), then

    def forward(self, x):
        return self._then(self, self.relu(self.lin(x)))


def image_net(**kwargs):
    """A convolution of 4 images of 2 channels and 5×5 pixels, and a linear readout."""
    conv, x = nn.Conv2d(2, 4, 3, **kwargs), torch.randn(4, 2, 5, 5)
    readout = nn.Linear(conv(x)[0].numel(), 3)
    return nn.Sequential(conv, nn.Flatten(), readout).double(), x.double()


def softmax_root(f):
    """Columns [C, N, C] of a square root of diag(p) − ppᵀ."""
    p = f.softmax(-1).detach()
    s = p.sqrt()
    return (torch.diag_embed(s) - p[..., :, None] * s[..., None, :]).movedim(-1, 0)


def in_positions(layer, a):
    if isinstance(layer, nn.Linear):
        return a.reshape(len(a), -1, a.shape[-1])
    mode = "constant" if layer.padding_mode == "zeros" else layer.padding_mode
    padded = F.pad(a, [layer.padding[1]] * 2 + [layer.padding[0]] * 2, mode=mode)
    return F.unfold(padded, layer.kernel_size, stride=layer.stride).mT


def out_positions(layer, z):
    return z.reshape(len(z), -1, z.shape[-1]) if isinstance(layer, nn.Linear) else z.flatten(2).mT


def reference(model, layer, x, root=softmax_root, patches_of=None):
    """Inputs a [N, R, I] and back-propagated columns g [C, N, R, O] of a layer by plain autograd, uses as positions."""
    calls = []
    handle = layer.register_forward_hook(lambda _, args, out: calls.append((args[0].detach(), out)))
    f = model(x)
    handle.remove()
    a = torch.cat([in_positions(patches_of or layer, a) for a, _ in calls], 1)
    outputs = [z for _, z in calls]
    columns = [torch.autograd.grad(f, outputs, s, retain_graph=True) for s in root(f)]
    return a, torch.stack([torch.cat([out_positions(layer, g) for g in column], 1) for column in columns])


def outer(v):
    """Σ v vᵀ over all but the last dimension."""
    v = v.flatten(0, -2)
    return v.mT @ v
