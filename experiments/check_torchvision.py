"""Which of torchvision's classifiers the backends cover, one of each family, with random weights.

    python experiments/check_torchvision.py [model …]

Runs what a fit runs first: uses and gradients of a few examples, held against autograd. Prints one line per model; needs no data.
"""

from __future__ import annotations

import argparse

import torch
import torchvision
from tqdm import tqdm

from laplace_ws import Laplace, UnsupportedParameterError
from laplace_ws.curvature import FACTOR_BACKENDS

IMAGE_SIZES = {
    "alexnet": 96,
    "convnext_tiny": 64,
    "densenet121": 64,
    "efficientnet_b0": 64,
    "efficientnet_v2_s": 64,
    "maxvit_t": 224,
    "mnasnet0_5": 64,
    "mobilenet_v2": 64,
    "mobilenet_v3_small": 64,
    "regnet_y_400mf": 64,
    "resnet18": 64,
    "resnext50_32x4d": 64,
    "shufflenet_v2_x0_5": 64,
    "squeezenet1_0": 64,
    "swin_t": 64,
    "swin_v2_t": 64,
    "vgg11_bn": 64,
    "vit_b_16": 32,
    "wide_resnet50_2": 64,
}
"""Sides of the images: as small as the model allows."""
N_EXAMPLES = 3


def answer(name: str, backend: str) -> str:
    """ "yes", or the error."""
    options = {"image_size": IMAGE_SIZES[name]} if name.startswith("vit") else {}
    torch.manual_seed(0)
    model = torchvision.models.get_model(name, weights=None, num_classes=10, **options)
    x = torch.randn(N_EXAMPLES, 3, IMAGE_SIZES[name], IMAGE_SIZES[name])
    try:
        Laplace(model, "classification", backend=backend).check(x)
    except UnsupportedParameterError as error:
        return str(error)
    return "yes"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("models", nargs="*", metavar="model", help=", ".join(IMAGE_SIZES))
    names = parser.parse_args().models or list(IMAGE_SIZES)
    for name in names:
        if name not in IMAGE_SIZES:
            parser.error(f"unknown model {name!r}: choose of {', '.join(IMAGE_SIZES)}")
    print(f"| | {' | '.join(FACTOR_BACKENDS)} |\n{'|---' * (len(FACTOR_BACKENDS) + 1)}|")
    for name in tqdm(names, unit="model", disable=None):
        answers = [answer(name, backend) for backend in FACTOR_BACKENDS]
        tqdm.write(f"| {name} | {' | '.join(answers)} |")


if __name__ == "__main__":
    main()
