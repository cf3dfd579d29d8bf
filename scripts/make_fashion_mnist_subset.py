"""Write the bundled Fashion-MNIST subset from the full data set; the same source and seed give the same file.

The training part is chosen from the training split only and the test part from the test split only, both
class-balanced. The source is a folder of the four gzipped IDX files, as in Debian's package dataset-fashion-mnist.
"""

from __future__ import annotations

import argparse
from pathlib import Path

import numpy as np

from laplace_ws.data.sources import DEBIAN_FASHION_MNIST, read_idx_split
from laplace_ws.data.transforms import balanced_indices

N_TRAIN, N_TEST = 4000, 1000
OUTPUT = Path(__file__).resolve().parents[1] / "laplace_ws" / "data" / "assets" / "fashion_mnist_subset.npz"


def subset(source: Path, prefix: str, n: int, seed: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Images [n, 28, 28], labels [n], and positions [n] in the full split, of `n` examples of one split."""
    split = read_idx_split(source, prefix)
    index = balanced_indices(split.y, n, seed=seed)
    return split.x[index, 0].numpy(), split.y[index].numpy().astype(np.uint8), index.numpy().astype(np.int64)


def main() -> None:
    """Parse the command line and write the file."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--source", type=Path, default=DEBIAN_FASHION_MNIST, help="folder of the gzipped IDX files")
    parser.add_argument("--output", type=Path, default=OUTPUT, help="file to write (.npz)")
    parser.add_argument("--seed", type=int, default=0, help="seed of the choice")
    options = parser.parse_args()
    if not options.source.is_dir():
        parser.error(f"'{options.source}' is no folder; install dataset-fashion-mnist or give --source")

    x_train, y_train, train_index = subset(options.source, "train", N_TRAIN, options.seed)
    x_test, y_test, test_index = subset(options.source, "t10k", N_TEST, options.seed)
    options.output.parent.mkdir(parents=True, exist_ok=True)
    np.savez_compressed(
        options.output,
        x_train=x_train,
        y_train=y_train,
        train_index=train_index,
        x_test=x_test,
        y_test=y_test,
        test_index=test_index,
    )
    print(f"{options.output}: {options.output.stat().st_size / 1e6:.2f} MB")


if __name__ == "__main__":
    main()
