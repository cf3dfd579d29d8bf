"""A network and a batch of a configuration, made ready to be measured."""

from __future__ import annotations

import torch

from bench_curvature.config import BenchConfig, NetworkConfig
from bench_curvature.setting import Setting, TrainingStep, make_batch, make_network

SMALL = NetworkConfig(depth=10, width=1, image_size=8, n_classes=3)
"""On which a process does first what it does once, whatever the network."""


def training_and_setting(
    config: BenchConfig, network: NetworkConfig, device: torch.device, n_images: int, kfac_approx: str, curvature: str
) -> tuple[TrainingStep, Setting]:
    """A training step of a network, and the same for the curvature: libraries leave hooks and tensors on theirs."""
    sizes = (network.depth, network.width, network.n_classes, config.network.norm, network.image_size)
    x, y = (t.to(device) for t in make_batch(n_images, network.n_classes, network.image_size, config.seed))
    trained, model = (make_network(*sizes, config.seed).to(device) for _ in range(2))
    return TrainingStep(trained, x, y), Setting(model, x, y, kfac_approx, curvature)
