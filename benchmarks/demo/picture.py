"""The picture in the README: `python -m benchmarks.demo.picture --data DIR --weights DIR --out docs/page.png`.

A screenshot, taken with Chromium, of the report page of the published ResNet-56 (CIFAR-10) with 30 % of all channels
merged and refit without data. One layer is selected. The example inputs, on which the output error is measured, are
training images.
"""

from __future__ import annotations

import argparse
import shutil
import subprocess
import tempfile
from pathlib import Path

import fxmerge
from benchmarks.networks.data import cifar10, mean_and_std, normalise
from benchmarks.networks.models import load_checkpoint, resnet56

LAYER = "layer2.0.conv2"


def screenshot(page: Path, layer: str, out: Path) -> None:
    """Open a report page in headless Chromium with `layer` selected, and write a PNG file."""
    program = shutil.which("chromium") or shutil.which("google-chrome")
    if program is None:
        raise SystemExit("Chromium was not found; install it with: apt-get install chromium")
    flags = ["--headless", "--no-sandbox", "--disable-gpu", "--window-size=1500,950", "--virtual-time-budget=15000"]
    address = f"{page.resolve().as_uri()}#{layer}"
    subprocess.run([program, *flags, f"--screenshot={out.resolve()}", address], check=True, capture_output=True)


def main() -> None:
    """The command line."""
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.demo.picture", description="Write the picture in the README."
    )
    parser.add_argument("--data", required=True, type=Path, metavar="DIR", help="folder that contains CIFAR-10")
    parser.add_argument("--weights", required=True, type=Path, metavar="DIR", help="folder with resnet56_cifar10")
    parser.add_argument("--out", required=True, type=Path, metavar="FILE", help="the PNG file")
    arguments = parser.parse_args()
    model = resnet56()
    metadata = load_checkpoint(arguments.weights / "resnet56_cifar10.safetensors", model)
    images = normalise(cifar10(arguments.data, "train")[0][:32], *mean_and_std(metadata))
    result = fxmerge.merge(model.eval(), images, ratio=0.3, refit="synthetic", samples=64)
    with tempfile.TemporaryDirectory() as folder:
        page = Path(folder) / "page.html"
        result.report.html(page)
        screenshot(page, LAYER, arguments.out)


if __name__ == "__main__":
    main()
