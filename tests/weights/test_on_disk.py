"""Weights on disk: every op, merge and saved folder is the same as in memory, and memory holds a part of the model."""

from __future__ import annotations

import copy
import os
import pickle
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from safetensors import safe_open
from safetensors.torch import load_file, save_file, save_model
from torch import Tensor, nn

import fxmerge
from fxmerge import FxMergeError
from fxmerge.calibration import stream
from fxmerge.graph.compare import difference, outputs
from fxmerge.methods.elimination import eliminate
from fxmerge.methods.evidence import Reading
from fxmerge.weights import stored_tensor
from fxmerge.weights.file_regions import Spool, regions
from fxmerge.weights.files import write_tensors
from fxmerge.weights.stored_tensor import Backing, StoredTensor
from tests.helpers.netmaking import one_thread  # noqa: F401
from tests.helpers.nets import NETS
from tests.helpers.small_llama import made

pytestmark = pytest.mark.usefixtures("one_thread")


class Net(nn.Module):
    """A net with weights larger than 64 KiB, which stay on disk, and a buffer that is not saved."""

    def __init__(self, width: int = 160) -> None:
        super().__init__()
        self.a, self.b, self.c = nn.Linear(width, width), nn.Linear(width, width), nn.Linear(width, 3)
        self.register_buffer("scale", torch.full((), 0.5), persistent=False)

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.c(F.relu(self.b(F.relu(self.a(x)))) * self.scale)
        return out


def net(path: Path, seed: int = 0) -> tuple[Net, Tensor]:
    torch.manual_seed(seed)
    model = Net().eval()
    save_file(model.state_dict(), path)
    return model, torch.randn(2, 160)


def on_disk(values: Tensor, path: Path) -> StoredTensor:
    save_file({"w": values}, path)
    region = regions(path)["w"]
    return StoredTensor(Backing(region, region.dtype, Spool()))


def same(one: nn.Module, other: nn.Module) -> bool:
    a, b = one.state_dict(), other.state_dict()
    return list(a) == list(b) and all(torch.equal(u, v) for u, v in zip(a.values(), b.values(), strict=True))


OPS: dict[str, Callable[[Tensor], Any]] = {
    "linear": lambda w: F.linear(torch.ones(2, 6), w, torch.ones(8)),
    "product": lambda w: w.t() @ w,
    "index": lambda w: w[torch.tensor([3, 1])][:, 2:],
    "split": lambda w: torch.cat([part * 2 for part in torch.split(w, 3)]),
    "cast": lambda w: w.double().sum(1),
    "embedding": lambda w: F.embedding(torch.tensor([1, 7]), w),
    "two": lambda w: torch.equal(w, w.clone()),
    "added": lambda w: w.detach().clone().add_(1),
    "data": lambda w: w.clone().data.copy_(torch.zeros(8, 6)),
    "out": lambda w: torch.add(torch.ones(8, 6), 1, out=w.clone()),
    "turned": lambda w: w.clone().t().mul_(3),
    "copy": lambda w: copy.deepcopy(w).mul_(2) - w,
}


@pytest.mark.parametrize("name", OPS)
def test_ops_give_what_they_give_in_memory(name: str, tmp_path: Path) -> None:
    values = torch.randn(8, 6)
    kept = on_disk(values, tmp_path / "w.safetensors")
    given, expected = OPS[name](kept), OPS[name](values)
    assert given == expected if isinstance(expected, bool) else torch.equal(given, expected)
    assert torch.equal(kept, values)  # whatever was done to its copies


def test_written_in_place_is_written_for_all_names_but_not_for_copies(tmp_path: Path) -> None:
    values = torch.randn(8, 6)
    kept = on_disk(values, tmp_path / "w.safetensors")
    before, alias = kept.clone(), kept.detach()
    kept.mul_(2)
    Backing.last = None  # what is read now comes from the files
    assert torch.equal(alias, 2 * values) and torch.equal(before, values)
    assert torch.equal(load_file(tmp_path / "w.safetensors")["w"], values)


def test_gradients_pass(tmp_path: Path) -> None:
    values = torch.randn(8, 6)
    kept = nn.Parameter(on_disk(values, tmp_path / "w.safetensors"))
    x, y = (torch.ones(2, 6, requires_grad=True) for _ in range(2))
    F.linear(x, kept).square().sum().backward()
    F.linear(y, values).square().sum().backward()
    assert x.grad is not None and y.grad is not None and torch.equal(x.grad, y.grad)


def test_temporary_files_go_with_their_tensors(tmp_path: Path) -> None:
    kept = on_disk(torch.randn(8, 6), tmp_path / "w.safetensors")
    folder = Path(kept.backing.store.folder.name)
    changed = kept.clone()
    changed.add_(1)
    changed.add_(1)
    assert len(list(folder.iterdir())) == 1
    Backing.last = None
    del changed
    assert not list(folder.iterdir())
    del kept
    assert not folder.exists()


def test_safetensors_written_here_are_read_by_their_library(tmp_path: Path) -> None:
    kinds = [torch.float32, torch.bfloat16, torch.float64, torch.int64, torch.bool, torch.uint8, torch.float8_e4m3fn]
    tensors = {f"{kind}": torch.randn(3, 5).mul(4).to(kind) for kind in kinds}
    tensors |= {"scalar": torch.tensor(3.0), "none": torch.empty(0, 4), "slanted": torch.randn(4, 3).t()}
    tensors["kept"] = on_disk(torch.randn(7, 2), tmp_path / "w.safetensors")
    write_tensors(tmp_path / "all.safetensors", tensors, {"told": "ä"})
    found = load_file(tmp_path / "all.safetensors")
    assert set(found) == set(tensors)
    for name, value in tensors.items():
        assert found[name].dtype == value.dtype and torch.equal(found[name].view(value.shape).double(), value.double())
    with safe_open(tmp_path / "all.safetensors", "pt") as opened:
        assert opened.metadata() == {"told": "ä"}
    with pytest.raises(FxMergeError, match=r"z is torch\.complex128, which safetensors cannot hold"):
        write_tensors(tmp_path / "no.safetensors", {"z": torch.zeros(1, dtype=torch.complex128)}, {})


@pytest.mark.parametrize("refit", ["none", "synthetic"])
@pytest.mark.parametrize("name", ["chain_2d", "residual", "grouped", "encoder", "raw_parameters", "flatten", "shuffle"])
def test_merged_as_in_memory_to_the_bit(name: str, refit: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(stored_tensor, "SMALL", 0)  # every tensor stays on disk
    model, x = NETS[name]()
    save_model(model, str(tmp_path / "w.safetensors"))
    options = {"refit": refit, "samples": 64}
    before = fxmerge.merge(model, x, **options)
    after = fxmerge.merge(fxmerge.on_disk(model, tmp_path / "w.safetensors"), x, **options)
    assert after.plan == before.plan and same(before.module, after.module)
    assert sum(isinstance(v, StoredTensor) for v in after.module.parameters()) > 2
    after.save(tmp_path / "after")
    before.save(tmp_path / "before")
    files = {p.name for p in (tmp_path / "before").iterdir()}
    assert files == {p.name for p in (tmp_path / "after").iterdir()} and "model.py" in files
    loaded = [fxmerge.load(tmp_path / folder, on_disk=kept) for folder in ("before", "after") for kept in (False, True)]
    own = fxmerge.load(tmp_path / "after", model=model)
    for module in (*loaded, own):
        assert difference(outputs(after.module, *_call(x)), outputs(module, *_call(x))) <= 1e-6


def _call(x: Any) -> tuple[Any, ...]:
    return ((), x) if isinstance(x, dict) else (x if isinstance(x, tuple) else (x,),)


@pytest.mark.parametrize("options", [{"decomposition": "lstsq"}, {"decomposition": "fold"}, {"selection": "gm"}])
def test_every_method_works_on_disk(options: dict[str, str], tmp_path: Path) -> None:
    model, x = net(tmp_path / "w.safetensors")
    kept = fxmerge.on_disk(Net, tmp_path / "w.safetensors")
    assert isinstance(kept.a.weight, StoredTensor) and not isinstance(kept.a.bias, StoredTensor)
    one, other = (fxmerge.merge(m, x, refit="none", **options) for m in (model, kept))
    assert same(one.module, other.module)
    assert same(fxmerge.apply(one.plan, kept, x).module, other.module)


def test_second_moments_on_disk_have_their_ridge() -> None:
    """With fewer rows than columns the ridge decides which channels go; a view of a stored tensor cannot be written."""
    generator, n = torch.Generator().manual_seed(0), 40
    rows, weight = (torch.randn(m, n, dtype=torch.float64, generator=generator) for m in (20, 8))
    gram = rows.T @ rows / len(rows)
    spool = Spool()
    stored = StoredTensor(Backing(spool.write(gram), gram.dtype, spool))
    orders = [
        eliminate([Reading(g, weight, torch.arange(n), torch.arange(n)[:, None])], torch.arange(n), 12).tolist()
        for g in (gram, stored)
    ]
    assert orders[0] == orders[1] and torch.equal(stored + 0, gram)


def test_a_language_model_is_refitted_as_in_memory_to_the_bit(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """In bfloat16, on calibration samples, with all that is done for large models and without."""
    model, ids, data = made(depth=3)
    save_model(model.bfloat16(), str(tmp_path / "w.safetensors"))
    options: dict[str, Any] = {"keep": {"*.gate": 0.75, "*": 1.0}, "calibration": data}
    before = fxmerge.merge(model, ids, **options)
    monkeypatch.setattr(stored_tensor, "SMALL", 0)  # every tensor stays on disk
    monkeypatch.setattr(stream, "WIDE", 0)
    after = fxmerge.merge(fxmerge.on_disk(model, tmp_path / "w.safetensors"), ids, **options)
    assert after.plan == before.plan and same(before.module, after.module)
    assert after.report.refitted == before.report.refitted
    assert any(record.after < record.before for record in after.report.refitted)


def test_a_folder_of_shards_with_an_index_and_weights_of_another_type(tmp_path: Path) -> None:
    model, x = net(tmp_path / "whole.safetensors")
    state = {name: value.bfloat16() for name, value in model.state_dict().items()}
    folder = tmp_path / "shards"
    folder.mkdir()
    names = sorted(state)
    for number, some in enumerate((names[:3], names[3:])):
        save_file({name: state[name] for name in some}, folder / f"{number}.safetensors")
    (folder / "stray.safetensors").write_bytes(b"not in the index")
    index = ", ".join(f'"{name}": "{int(name in names[3:])}.safetensors"' for name in names)
    (folder / "model.safetensors.index.json").write_text(f'{{"weight_map": {{{index}}}}}')
    model.load_state_dict(state)
    kept = fxmerge.on_disk(Net, folder)
    assert kept.a.weight.dtype == torch.float32 and torch.equal(kept(x), model(x))
    (folder / "stray.safetensors").unlink()
    for given in ([folder / "0.safetensors", str(folder / "1.safetensors")], folder / "model.safetensors.index.json"):
        assert torch.equal(fxmerge.on_disk(Net, given)(x), model(x))


def test_tied_weights_stay_tied(tmp_path: Path) -> None:
    tied = nn.Sequential(nn.Linear(130, 130), nn.ReLU(), nn.Linear(130, 130))
    tied[2].weight = tied[0].weight
    save_model(tied, str(tmp_path / "w.safetensors"))
    kept = fxmerge.on_disk(tied, tmp_path / "w.safetensors")
    assert kept[2].weight is kept[0].weight and isinstance(kept[0].weight, StoredTensor)
    assert isinstance(tied[0].weight, nn.Parameter) and not isinstance(tied[0].weight, StoredTensor)


def test_in_memory_again(tmp_path: Path) -> None:
    model, x = net(tmp_path / "w.safetensors")
    kept = fxmerge.on_disk(model, tmp_path / "w.safetensors")
    with pytest.raises(FxMergeError, match="in_memory"):
        kept.double()
    with pytest.raises(FxMergeError, match=r"result\.save"):
        pickle.dumps(kept.a.weight)
    back = fxmerge.in_memory(kept)
    assert not any(isinstance(p, StoredTensor) for p in back.parameters()) and same(back, model)
    assert isinstance(kept.a.weight, StoredTensor)
    assert torch.allclose(back.double()(x.double()).float(), model(x), atol=1e-5)


def test_wrong_files_are_named(tmp_path: Path) -> None:
    path = tmp_path / "w.safetensors"
    model, _ = net(path)

    def refused(match: str, weights: Any = path, what: Any = Net) -> None:
        with pytest.raises(FxMergeError, match=match):
            fxmerge.on_disk(what, weights)

    refused("none.safetensors does not exist", tmp_path / "none.safetensors")
    (tmp_path / "empty").mkdir()
    refused("there is no .safetensors file", tmp_path / "empty")
    refused("model is a int; give a torch.nn.Module, or a function", path, 3)
    refused("a.bias is in .* and in", [path, path])
    refused(r"a.weight is \(160, 160\) in .* and \(170, 170\) in Net", path, lambda: Net(170))
    state = model.state_dict()
    save_file({**state, "more": torch.zeros(1)}, path)
    refused("it has more, which the model does not have")
    save_file({k: v for k, v in state.items() if k != "b.bias"}, path)
    refused("it has no b.bias")
    path.write_bytes(path.read_bytes()[:-8])
    refused("cannot read weights from")
    (tmp_path / "model.safetensors.index.json").write_text("[]")
    refused("is not an index of safetensors files", tmp_path)
    save_file(state, path)
    with torch.device("meta"):
        bare = Net()
    refused("scale is in none of the files and has no value", path, bare)


def test_a_file_that_changes_is_noticed(tmp_path: Path) -> None:
    path = tmp_path / "w.safetensors"
    model, x = net(path)
    kept = fxmerge.on_disk(Net, path)
    save_file({k: v + 1 for k, v in model.state_dict().items()}, path)
    Backing.last = None
    with pytest.raises(FxMergeError, match="has changed"):
        fxmerge.merge(kept, x)
    path.unlink()
    with pytest.raises(FxMergeError, match=r"cannot read weights from .*w\.safetensors: "):
        kept(x)


def test_command_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    from fxmerge.cli.main import main

    net(tmp_path / "w.safetensors")
    spec, out = f"{__file__}:Net", ["--shape", "2", "160", "--refit", "none", "--out"]
    weights = ["--weights", str(tmp_path / "w.safetensors")]
    assert main(["merge", spec, *weights, *out, str(tmp_path / "one")]) == 0
    assert main(["merge", spec, *weights, "--on-disk", *out, str(tmp_path / "two")]) == 0
    assert main(["merge", str(tmp_path / "two"), "--on-disk", *out, str(tmp_path / "less")]) == 0
    one, two, less = (load_file(tmp_path / f / "weights.safetensors") for f in ("one", "two", "less"))
    assert all(torch.equal(one[name], two[name]) for name in one) and len(less["a.bias"]) < len(one["a.bias"])
    capsys.readouterr()
    assert main(["merge", spec, "--on-disk", *out, str(tmp_path / "no")]) == 2
    assert "--on-disk needs --weights" in capsys.readouterr().err


LIMITED = """
import resource, sys, torch, fxmerge
from benchmarks.speed.growth import Net
torch.set_num_threads(1)
path, out, kept = sys.argv[1], sys.argv[2], sys.argv[3] == "disk"
net, small = Net("linear", 128, 1024), Net("linear", 2, 8)
fxmerge.merge(small.model(), small.example(), refit="none").save(out)  # so that everything is imported
fxmerge.load(out, on_disk=True)
with torch.device("meta"):
    bare = net.model()  # torch imports much for initialization on this device
held = next(int(line.split()[1]) for line in open("/proc/self/status") if line.startswith("VmData"))
resource.setrlimit(resource.RLIMIT_DATA, (held * 1024 + 128 * 2**20,) * 2)
model = fxmerge.on_disk(bare, path)
given = model if kept else fxmerge.in_memory(model)
fxmerge.merge(given, net.example(), refit="none", decomposition="mostsim").save(out)
print("merged")
"""


@pytest.mark.slow
@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="sets and reads memory limits as on Linux")
def test_a_model_of_four_times_the_memory(tmp_path: Path) -> None:
    """512 MiB of weights are merged with a limit of 128 MiB on the memory that the process may allocate."""
    from benchmarks.speed.growth import Net as Growing
    from benchmarks.speed.growth import write_layers

    files = tmp_path / "w"
    files.mkdir()
    write_layers(Growing("linear", 128, 1024), files)
    # large tensors get their own pages; otherwise the gaps left by freed tensors would count towards the limit
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "MALLOC_MMAP_THRESHOLD_": "131072"}
    command = [sys.executable, "-c", LIMITED, str(files), str(tmp_path / "out")]
    done = [
        subprocess.run([*command, how], capture_output=True, text=True, env=environment) for how in ("disk", "memory")
    ]
    assert done[0].stdout.strip() == "merged", done[0].stderr
    assert done[1].returncode != 0 and "memory" in done[1].stderr  # the whole model does not fit into the limit
