"""Data that live on the training device: image data sets, batches, augmentation, corruption, batches of graphs, and regression tables."""

from __future__ import annotations

from laplace_ws.data.augment import random_crop_flip
from laplace_ws.data.corruptions import STRENGTHS, Corruption, corrupt
from laplace_ws.data.datasets import DATASET_NAMES, ImageData, load_dataset
from laplace_ws.data.graphs import GraphBatch
from laplace_ws.data.loaders import TensorLoader
from laplace_ws.data.own import as_data, part_of
from laplace_ws.data.sources import DatasetNotFoundError
from laplace_ws.data.transforms import balanced_indices, channel_statistics, fitted
from laplace_ws.data.uci import UciSplit, load_uci

__all__ = [
    "DATASET_NAMES",
    "STRENGTHS",
    "Corruption",
    "DatasetNotFoundError",
    "GraphBatch",
    "ImageData",
    "TensorLoader",
    "UciSplit",
    "as_data",
    "balanced_indices",
    "channel_statistics",
    "corrupt",
    "fitted",
    "load_dataset",
    "load_uci",
    "part_of",
    "random_crop_flip",
]
