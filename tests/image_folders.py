"""Folders of small images, as users have them."""

from pathlib import Path

import torch
from PIL import Image


def image_folder(root: Path, n: int = 6, side: int = 32) -> None:
    """Coloured noise in PNG files, n of each of two classes in train and in test; the second is brighter."""
    generator = torch.Generator().manual_seed(0)
    for split in ("train", "test"):
        for label, name in enumerate(("cat", "dog")):
            folder = root / split / name
            folder.mkdir(parents=True)
            for i in range(n):
                noise = torch.randint(100, (side, side, 3), generator=generator) + 100 * label
                Image.fromarray(noise.to(torch.uint8).numpy()).save(folder / f"{i}.png")
