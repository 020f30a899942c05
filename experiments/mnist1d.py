"""Writes mnist1d.npz for configs/mnist1d.toml, from the package mnist1d, which it needs: pip install mnist1d.

Source: S. Greydanus and D. Kobak, *Scaling down deep learning with MNIST-1D*, 2024.

Command: python -m experiments.mnist1d [PATH]
"""

import argparse
from collections.abc import Sequence

import numpy as np


def main(arguments: Sequence[str] | None = None) -> None:
    """Makes the 4,000 training and 1,000 test signals as the package's own defaults make them."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("path", nargs="?", default="mnist1d.npz", help="the file that is written")
    path = parser.parse_args(arguments).path
    try:
        from mnist1d.data import get_dataset_args, make_dataset
    except ModuleNotFoundError:
        parser.exit(2, "mnist1d: the package mnist1d is not installed: pip install mnist1d\n")
    data = make_dataset(get_dataset_args())
    arrays = {name: data[name].astype(np.float32) for name in ("x", "x_test")}
    np.savez(path, **arrays, y=data["y"], y_test=data["y_test"])
    print(path)


if __name__ == "__main__":
    main()
