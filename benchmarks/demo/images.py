"""Write the images of `fxmerge demo`: `python -m benchmarks.demo.images --data DIR`.

The file has the first 2,000 test images of Fashion-MNIST: `images` uint8 (2000, 28, 28) and `labels` uint8 (2000,).
"""

import argparse
import zipfile
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from benchmarks.networks.data import fashion_mnist

COUNT = 2000
OUT = Path(__file__).parents[2] / "fxmerge" / "assets" / f"fashion_mnist_{COUNT}.npz"


def main(argv: Sequence[str] | None = None) -> None:
    """The command line."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.demo.images", description="Write the demo's images.")
    parser.add_argument("--data", required=True, metavar="DIR", help="folder that contains Fashion-MNIST")
    parser.add_argument("--out", type=Path, default=OUT, metavar="FILE.npz")
    args = parser.parse_args(argv)
    try:
        images, labels = fashion_mnist(args.data, "test")
    except FileNotFoundError as error:
        parser.exit(1, f"{error}\n")
    args.out.parent.mkdir(parents=True, exist_ok=True)
    write(args.out, images=images[:COUNT].numpy(), labels=labels[:COUNT].numpy().astype(np.uint8))


def write(path: Path, **arrays: NDArray[np.uint8]) -> None:
    """An .npz file that np.load reads, compressed by LZMA: a sixth smaller than that of `np.savez_compressed`."""
    with zipfile.ZipFile(path, "w") as found:
        for name, array in arrays.items():
            entry = zipfile.ZipInfo(f"{name}.npy")  # of a fixed date
            entry.compress_type = zipfile.ZIP_LZMA
            with found.open(entry, "w") as file:
                np.lib.format.write_array(file, np.ascontiguousarray(array), allow_pickle=False)


if __name__ == "__main__":
    main()
