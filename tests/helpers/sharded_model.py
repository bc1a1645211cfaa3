"""A script for two processes that merge a model sharded by FSDP2 (tests/capture/test_sharded.py).

Each process writes what it found as JSON.
"""

import json
import sys
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard
from torch.distributed.tensor import DTensor
from torch.distributed.tensor.parallel import ColwiseParallel, parallelize_module

import fxmerge
from fxmerge.weights import shards, stored_tensor
from fxmerge.weights.stored_tensor import StoredTensor

WIDTH = 17  # odd, so that the two processes have different numbers of rows


class Block(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(WIDTH)
        self.up, self.down = nn.Linear(WIDTH, 41), nn.Linear(41, WIDTH)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x + self.down(torch.relu(self.up(self.norm(x))))


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Linear(6, WIDTH)
        self.blocks = nn.ModuleList([Block(), Block()])
        self.head = nn.Linear(WIDTH, 4)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.embed(x)
        for block in self.blocks:
            x = block(x)
        return self.head(x)


def make() -> Net:
    torch.manual_seed(0)
    model = Net().eval()
    with torch.no_grad():
        for block in model.blocks:
            block.norm.weight.uniform_(0.5, 2)
    return model


def sharded(mesh: Any, **settings: Any) -> Net:
    model = make()
    for block in model.blocks:
        fully_shard(block, mesh=mesh, **settings)
    fully_shard(model, mesh=mesh, **settings)
    return model


def kinds(module: nn.Module) -> list[str]:
    return sorted({type(value).__name__ for value in module.parameters()})


def equal(one: nn.Module, other: nn.Module) -> bool:
    mine, others = one.state_dict(), other.state_dict()
    return mine.keys() == others.keys() and all(torch.equal(mine[k].detach() + 0, others[k] + 0) for k in mine)


torch.set_num_threads(1)
torch.distributed.init_process_group("gloo")
rank = torch.distributed.get_rank()
stored_tensor.SMALL = 0
mesh = init_device_mesh("cpu", (2,))
x = torch.randn(3, 6, generator=torch.Generator().manual_seed(1))
batches = [torch.randn(8, 6, generator=torch.Generator().manual_seed(n)) for n in range(5)]  # one more than they share
found: dict[str, Any] = {}
for name, options in {
    "none": {"ratio": 0.5, "refit": "none", "scope": "all"},
    "calibration": {"ratio": 0.5, "calibration": batches[:4], "scope": "all"},
    "budget": {"budget": {"params": 0.5}, "calibration": batches[:4]},
}.items():
    model = sharded(mesh)
    before = model(x).detach()  # after this, the outermost weights are whole until the next call
    result = fxmerge.merge(model, x, **options)
    whole = fxmerge.merge(make(), x, **options)
    expected, module, own = whole.module(x).detach(), result.module, result.model
    held = [value.backing.region for value in result.report.module.parameters() if isinstance(value, StoredTensor)]
    assert own is not None
    found[name] = {
        "plan": result.plan.groups == whole.plan.groups and len(result.plan.groups) > 1,
        "weights": equal(result.report.module, whole.module),
        "rows": all(abs(len(r.held) - r.shape[0] / 2) <= 0.5 for r in held if r.shape[0] > 1) and len(held) > 8,
        "kinds": [kinds(module), kinds(own)],
        "classes": [type(own).__name__, type(own.blocks[0]).__name__, type(module.get_submodule("head")).__name__],
        "outputs": [float((m(x) - expected).abs().max() / expected.abs().max()) for m in (module, own)],
        "before": torch.equal(model(x), before) and kinds(sharded(mesh)) == ["DTensor"],
    }
    own(x).square().sum().backward()
    whole.module(x).square().sum().backward()
    slopes = [own.blocks[0].up.weight.grad, whole.module.get_parameter("blocks.0.up.weight").grad]
    assert isinstance(slopes[0], DTensor)
    found[name]["gradient"] = torch.allclose(slopes[0].full_tensor(), slopes[1], atol=1e-5)

# what is written, after a step of training
torch.optim.SGD(module.parameters(), 0.1).zero_grad()
module(x).square().sum().backward()
torch.optim.SGD(module.parameters(), 0.1).step()
trained = module(x).detach()
folder = Path(sys.argv[1], "saved")
result.save(folder)
in_memory = fxmerge.in_memory(module)
found["saved"] = [float((m(x) - trained).abs().max()) for m in (fxmerge.load(folder), in_memory)]
found["in memory"] = kinds(in_memory), sorted(p.name for p in Path(sys.argv[1]).iterdir() if not p.suffix)
counting = sharded(mesh)
counting.register_buffer("seen", torch.zeros(3))
fxmerge.in_memory(counting).get_buffer("seen").add_(1)
found["buffer"] = counting.get_buffer("seen").tolist()
result.save_program(Path(sys.argv[1], "program.pt2"))
found["program"] = float((torch.export.load(Path(sys.argv[1], "program.pt2")).module()(x) - trained).abs().max())
if rank == 0:  # one process alone may look at the reports
    found["report"] = [len(r.text()) + len(r.html()) for r in (result.report, result.analysis.report)]

# other ways to divide
policy = MixedPrecisionPolicy(param_dtype=torch.bfloat16)
pairs = init_device_mesh("cpu", (1, 2), mesh_dim_names=("replicate", "shard"))
result = fxmerge.merge(sharded(pairs, mp_policy=policy), x, ratio=0.5, refit="none")
weight = result.module.get_parameter("head.weight")
whole = fxmerge.merge(make(), x, ratio=0.5, refit="none").module
same = equal(result.report.module, whole)
found["replicated"] = [str(weight.placements), str(result.module(x).dtype), same]
uneven = fxmerge.merge(sharded(mesh), x, ratio=0.5, calibration=batches)
found["uneven"] = [str(uneven.report.source), kinds(uneven.module)]


def said(act: Any) -> str:
    try:
        act()
    except fxmerge.FxMergeError as error:
        return str(error)
    return ""


parallel = make()
parallelize_module(parallel, mesh, {"blocks.0.up": ColwiseParallel()})
found["refused"] = said(lambda: fxmerge.merge(parallel, x))
found["shrinker"] = said(lambda: fxmerge.Shrinker(sharded(mesh), x, ratio=0.5, steps=10))
found["distilled"] = said(lambda: fxmerge.distill(result, [x]))
plain, _ = shards.undivided(sharded(mesh))
read = [plain.get_parameter("embed.weight"), plain.get_parameter("head.weight")]
found["order"] = said(lambda: read[rank] + 0)
if rank:  # this process alone does more, and the next merge works nevertheless
    shards._Rows(torch.zeros(1), (2,), None)
again = fxmerge.merge(sharded(mesh), x, ratio=0.5, refit="none").module
found["again"] = kinds(again)
Path(sys.argv[1], f"{rank}.json").write_text(json.dumps(found), encoding="utf-8")
torch.distributed.destroy_process_group()
