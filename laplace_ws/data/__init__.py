"""Data that live on the training device: image data sets, batches, augmentation, and batches of graphs."""

from __future__ import annotations

from laplace_ws.data.augment import random_crop_flip
from laplace_ws.data.datasets import DATASET_NAMES, ImageData, load_dataset
from laplace_ws.data.graphs import GraphBatch
from laplace_ws.data.loaders import TensorLoader
from laplace_ws.data.sources import DatasetNotFoundError
from laplace_ws.data.transforms import balanced_indices, channel_statistics

__all__ = [
    "DATASET_NAMES",
    "DatasetNotFoundError",
    "GraphBatch",
    "ImageData",
    "TensorLoader",
    "balanced_indices",
    "channel_statistics",
    "load_dataset",
    "random_crop_flip",
]
