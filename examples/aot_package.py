"""Merge a model, compile it ahead of time with AOTInductor, and run the package without Python model code."""

import tempfile
from pathlib import Path

import torch
from torch import nn

import fxmerge

torch.manual_seed(0)
model = nn.Sequential(
    nn.Conv2d(3, 16, 3), nn.BatchNorm2d(16), nn.ReLU(), nn.Conv2d(16, 32, 3), nn.ReLU(),
    nn.Flatten(), nn.Linear(3200, 10),
).eval()  # fmt: skip
batch = torch.export.Dim("batch", min=1, max=64)
program = torch.export.export(model, (torch.randn(2, 3, 14, 14),), dynamic_shapes=({0: batch},))

result = fxmerge.merge(program, ratio=0.5)  # an ExportedProgram has its own example inputs

with tempfile.TemporaryDirectory() as folder:
    package = torch._inductor.aoti_compile_and_package(result.exported(), package_path=str(Path(folder) / "merged.pt2"))
    compiled = torch._inductor.aoti_load_package(package)
    x = torch.randn(5, 3, 14, 14)
    with torch.no_grad():
        error = float((compiled(x) - result.module(x)).abs().max())
    print(f"package of {Path(package).stat().st_size // 1000} kB; a batch of 5 gives {tuple(compiled(x).shape)}")
    print("the package has the output of the merged model:", error < 1e-5)
