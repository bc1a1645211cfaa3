"""Saved folders: model.py in a separate process, weights in the user's class, damaged folders, and killed saves."""

from __future__ import annotations

import ast
import copy
import ctypes
import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

import fxmerge
from fxmerge import FxMergeError
from fxmerge.graph.compare import difference, outputs
from fxmerge.graph.outputs import returned
from fxmerge.weights.files import _exchange
from tests.helpers.netmaking import one_thread, plain_merge, randomised  # noqa: F401
from tests.helpers.nets import NETS

pytestmark = pytest.mark.usefixtures("one_thread")
TESTS = Path(__file__).resolve().parents[1]


class Odd(nn.Module):
    """Names that are not identifiers, nested lists, ties, a constant, a frozen bias, a non-persistent buffer."""

    def __init__(self) -> None:
        super().__init__()
        self.words = nn.Embedding(11, 8)
        self.keys = nn.ModuleDict({"k-1": nn.Linear(8, 12), "z": nn.ReLU()})
        self.lists = nn.ModuleList([nn.Identity(), nn.ModuleList([nn.Linear(12, 8)])])
        self.again = self.keys["k-1"]
        self.head = nn.Linear(8, 11, bias=False)
        self.head.weight = self.words.weight
        self.again.bias.requires_grad_(False)
        self.register_buffer("off", torch.arange(5), persistent=False)

    def forward(self, x: Tensor, scale: float = 0.5) -> dict[str, Any]:
        y = self.words(x + self.off)
        for layer in (self.keys["k-1"], self.again):
            y = y + self.lists[1][0](self.lists[0](self.keys["z"](layer(y)))) * scale  # type: ignore[index]
        return {"y": self.head(y), "more": [y[:, 1:3, ::2], (y.amax(),)]}


class Recurrent(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.a, self.b, self.c = nn.Linear(6, 8), nn.Linear(8, 8), nn.Linear(8, 3)
        self.r = nn.LSTM(8, 4, num_layers=2, batch_first=True, bidirectional=True)

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.c(self.r(self.b(F.relu(self.a(x))))[0])
        return out


class Enlarged(nn.Module):
    """A layer whose constructor takes a `mode`."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = nn.Conv2d(3, 8, 3), nn.Conv2d(8, 4, 3)
        self.up = nn.Upsample(scale_factor=2, mode="bilinear", align_corners=True)

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.b(self.up(F.relu(self.a(x))))
        return out


def sequential(*first: nn.Module) -> nn.Module:
    """A model whose layers are numbered, with one convolution used twice."""
    again = nn.Conv2d(8, 8, 3, padding=1)
    layers = [*first, nn.BatchNorm2d(8), again, nn.ReLU(), again, nn.Flatten(), nn.Linear(288, 4)]
    return nn.Sequential(*layers).eval()


class Mixed(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = nn.Linear(6, 8), nn.Linear(8, 8).double()
        self.p = nn.Parameter(torch.randn(8, dtype=torch.float64))

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.b(torch.relu(self.a(x)).double()) * self.p
        return out


def half() -> tuple[nn.Module, Any]:
    model, x = NETS["residual"]()
    return model.bfloat16(), x.bfloat16()


def torchvision_net(name: str, size: int) -> tuple[nn.Module, Any]:
    models = pytest.importorskip("torchvision").models
    return models.get_model(name, weights=None).eval(), torch.randn(2, 3, size, size)


def vit() -> tuple[nn.Module, Any]:
    models = pytest.importorskip("torchvision").models
    return models.VisionTransformer(32, 8, 2, 4, 64, 96, num_classes=9).eval(), torch.randn(2, 3, 32, 32)


def timm_vit() -> tuple[nn.Module, Any]:
    timm = pytest.importorskip("timm")
    made = timm.create_model("vit_tiny_patch16_224", depth=2, img_size=32, patch_size=8, num_classes=10)
    return made.eval(), torch.randn(2, 3, 32, 32)


def bert() -> tuple[nn.Module, Any]:
    transformers = pytest.importorskip("transformers")
    config = transformers.BertConfig(
        hidden_size=32, num_hidden_layers=2, num_attention_heads=2, intermediate_size=48, vocab_size=50
    )
    return transformers.BertModel(config).eval(), {"input_ids": torch.randint(0, 50, (2, 8))}


def gpt2() -> tuple[nn.Module, Any]:
    transformers = pytest.importorskip("transformers")
    config = transformers.GPT2Config(
        n_embd=32, n_layer=2, n_head=2, vocab_size=50, n_positions=32, bos_token_id=0, eos_token_id=0
    )
    return transformers.GPT2LMHeadModel(config).eval(), {"input_ids": torch.randint(1, 50, (2, 8))}


MODELS: dict[str, Callable[[], tuple[nn.Module, Any]]] = {
    **NETS,
    "odd": lambda: (Odd().eval(), torch.randint(0, 5, (2, 5))),
    "recurrent": lambda: (Recurrent().eval(), torch.randn(2, 5, 6)),
    "sequential": lambda: (sequential(nn.Conv2d(3, 8, 3)), torch.randn(2, 3, 8, 8)),
    "nested": lambda: (sequential(nn.Sequential(nn.Conv2d(3, 8, 3)), nn.Sequential()), torch.randn(2, 3, 8, 8)),
    "enlarged": lambda: (Enlarged().eval(), torch.randn(2, 3, 8, 8)),
    "mixed": lambda: (Mixed().eval(), torch.randn(2, 6)),
    "bfloat16": half,
    "resnet18": lambda: torchvision_net("resnet18", 64),
    "densenet121": lambda: torchvision_net("densenet121", 64),
    "vit": vit,
    "timm_vit": timm_vit,
    "bert": bert,
    "gpt2": gpt2,
}
# literal sizes in the code of forward, that no attribute holds
RIGID = ("reshape", "sliced", "scores", "one_norm_for_all")


def made(name: str) -> tuple[nn.Module, Any]:
    torch.manual_seed(0)
    model, x = MODELS[name]()
    return (randomised(model) if name in ("resnet18", "densenet121", "vit") else model), x


def other(model: nn.Module) -> nn.Module:
    """The same class with other weights."""
    fresh = copy.deepcopy(model)
    with torch.no_grad():
        for value in fresh.parameters():
            value.copy_(torch.randn_like(value))
    return fresh


def saved(name: str, folder: Path) -> tuple[fxmerge.Result, nn.Module]:
    model, x = made(name)
    result = plain_merge(model, x, ratio=0.5)
    result.save(folder)
    return result, model


def given(result: fxmerge.Result, module: nn.Module) -> list[Tensor]:
    captured = result.analysis.captured
    return outputs(module, captured.args, captured.kwargs)


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, tuple[fxmerge.Result, Path, Any]]:
    """Every model merged and saved; then every model.py is run in one process without fxmerge."""
    found = {}
    for name in MODELS:
        try:
            model, x = made(name)
        except pytest.skip.Exception:
            continue
        result = plain_merge(model, x, ratio=0.5)
        place = tmp_path_factory.mktemp(name)
        result.save(place / "saved")
        captured = result.analysis.captured
        torch.save((captured.args, captured.kwargs), place / "inputs.pt")
        found[name] = (result, place / "saved", model)
    program = [sys.executable, str(TESTS / "helpers" / "saved_alone.py"), *(str(f) for _, f, _ in found.values())]
    done = subprocess.run(program, capture_output=True, text=True, env={**os.environ, "PYTHONPATH": ""})
    assert done.returncode == 0, done.stderr
    return found


@pytest.mark.slow
@pytest.mark.parametrize("name", MODELS)
def test_every_route_back_gives_the_merged_model(name: str, folders: dict[str, Any]) -> None:
    """model.py in a separate process, fxmerge.load, and an instance of the user's class with other weights."""
    if name not in folders:
        pytest.skip("its package is not installed")
    result, folder, model = folders[name]
    expected = given(result, result.module)
    assert difference(given(result, model), expected) > 1e-4  # otherwise a failed load would go unnoticed
    alone = torch.load(folder.parent / "outputs.pt")
    assert difference(expected, returned(alone)) <= 1e-6
    assert difference(expected, given(result, fxmerge.load(folder))) <= 1e-6
    before = {k: v.clone() for k, v in model.state_dict().items()}
    if name in RIGID:
        message = r"cannot be loaded into the user's own class: the code of Net has sizes that cannot"
        with pytest.raises(FxMergeError, match=message):
            fxmerge.load(folder, model=model)
    else:
        own = fxmerge.load(folder, model=other(model))
        assert type(own) is type(model)
        assert difference(expected, given(result, own)) <= (3e-2 if name == "bfloat16" else 1e-5)
    assert all(torch.equal(before[k], v) for k, v in model.state_dict().items())


@pytest.mark.parametrize("dims", [2, 3, 4, 5])
def test_batch_norms_of_exported_graphs_take_their_inputs(dims: int, tmp_path: Path) -> None:
    """The aten op takes inputs of any number of dimensions, each layer only those of its class."""
    torch.manual_seed(0)
    first: nn.Module = nn.Linear(3, 8) if dims == 2 else (nn.Conv1d, nn.Conv2d, nn.Conv3d)[dims - 3](3, 8, 1)
    norm = (nn.BatchNorm1d, nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d)[dims - 2](8)
    last: nn.Module = nn.Linear(8, 2) if dims == 2 else (nn.Conv1d, nn.Conv2d, nn.Conv3d)[dims - 3](8, 2, 1)
    model, x = randomised(nn.Sequential(first, norm, nn.ReLU(), last)).eval(), torch.randn(4, 3, *[5] * (dims - 2))
    result = plain_merge(torch.export.export(model, (x,)), None, ratio=0.5)
    result.save(tmp_path / "saved")
    text = (tmp_path / "saved" / "model.py").read_text()  # with older versions of torch such a graph keeps its aten ops
    assert (f"nn.{type(norm).__name__}(" in text) == (f"nn.{type(first).__name__}(" in text)
    assert difference(given(result, result.module), given(result, fxmerge.load(tmp_path / "saved"))) <= 1e-6


@pytest.mark.slow
def test_what_a_folder_holds(folders: dict[str, Any]) -> None:
    result, folder, _ = folders["residual"]
    names = {"model.py", "weights.safetensors", "plan.json", "report.txt", "report.json", "report.html"}
    assert {p.name for p in folder.iterdir()} == names
    assert fxmerge.Plan.from_json((folder / "plan.json").read_text()) == result.plan
    assert json.loads((folder / "report.json").read_text()) == json.loads(result.report.json())
    assert (folder / "report.txt").read_text() == result.report.text()
    assert {k: v.shape for k, v in load_file(folder / "weights.safetensors").items()} == {
        k: v.shape for k, v in result.module.state_dict().items()
    }


@pytest.mark.slow
@pytest.mark.parametrize("name", MODELS)
def test_model_py_is_plain_and_formatted(name: str, folders: dict[str, Any]) -> None:
    if name not in folders:
        pytest.skip("its package is not installed")
    path = folders[name][1] / "model.py"
    imported = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            imported |= {alias.name.split(".")[0] for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            imported.add(str(node.module).split(".")[0])
    assert imported <= {"torch", "torchvision", "timm"} | set(sys.stdlib_module_names)
    pytest.importorskip("ruff")
    command = [sys.executable, "-m", "ruff", "format", "--isolated", "--line-length", "120", "--diff", str(path)]
    formatted = subprocess.run(command, capture_output=True, text=True)
    assert formatted.returncode == 0, formatted.stdout
    checked = [sys.executable, "-m", "ruff", "check", "--isolated", "--select", "F,I,E7", str(path)]
    found = subprocess.run(checked, capture_output=True, text=True)
    assert found.returncode == 0, found.stdout


@pytest.mark.slow
@pytest.mark.parametrize("name", ["resnet18", "vit", "odd"])
def test_golden_source(name: str, folders: dict[str, Any]) -> None:
    """The generated code equals the stored one; FXMERGE_UPDATE_GOLDEN=1 updates it."""
    if name not in folders:
        pytest.skip("its package is not installed")
    text = (folders[name][1] / "model.py").read_text()
    golden = TESTS / "golden" / f"{name}.txt"
    if os.environ.get("FXMERGE_UPDATE_GOLDEN"):
        golden.parent.mkdir(exist_ok=True)
        golden.write_text(text)
    assert text == golden.read_text()


@pytest.mark.slow
def test_ties_frozen_parameters_and_types_come_back(folders: dict[str, Any]) -> None:
    _, folder, model = folders["odd"]
    for module in (fxmerge.load(folder), fxmerge.load(folder, model=model)):
        assert module.head.weight is module.words.weight
        frozen = {n.replace("again", "keys.k-1") for n, p in module.named_parameters() if not p.requires_grad}
        assert frozen == {"keys.k-1.bias"}
    mixed = fxmerge.load(folders["mixed"][1])
    assert (mixed.a.weight.dtype, mixed.b.weight.dtype) == (torch.float32, torch.float64)
    assert {v.dtype for v in fxmerge.load(folders["bfloat16"][1]).parameters()} == {torch.bfloat16}


@pytest.mark.slow
def test_generate_in_the_users_class(folders: dict[str, Any]) -> None:
    if "gpt2" not in folders:
        pytest.skip("transformers is not installed")
    _, folder, model = folders["gpt2"]
    own = fxmerge.load(folder, model=other(model))
    prompt = torch.randint(1, 50, (1, 4))
    generated = own.generate(prompt, max_new_tokens=4, do_sample=False, eos_token_id=None)
    greedy = prompt
    for _ in range(4):  # without a key-value cache
        greedy = torch.cat([greedy, own(greedy).logits[:, -1:].argmax(-1)], 1)
    assert torch.equal(generated, greedy)
    assert sum(p.numel() for p in own.parameters()) < 0.8 * sum(p.numel() for p in model.parameters())


@pytest.mark.slow
def test_a_detection_model(tmp_path: Path) -> None:
    """Only parts of it can be traced: there is no model.py, but the weights can be loaded into the user's class."""
    detection = pytest.importorskip("torchvision").models.detection
    torch.manual_seed(0)
    model = detection.fasterrcnn_mobilenet_v3_large_320_fpn(weights=None, weights_backbone=None).eval()
    result = plain_merge(model, ([torch.rand(3, 96, 96)],), ratio=0.5)
    result.save(tmp_path / "o")
    assert not (tmp_path / "o" / "model.py").exists()
    own = fxmerge.load(tmp_path / "o", model=other(model))
    assert difference(given(result, result.module), given(result, own)) <= 1e-5
    assert sum(p.numel() for p in own.parameters()) == sum(p.numel() for p in result.module.parameters())
    message = r"has no model.py: only parts of the model could be traced; .*; call load\("
    with pytest.raises(FxMergeError, match=message):
        fxmerge.load(tmp_path / "o")


def mine(x: Tensor) -> Tensor:
    return torch.special.bessel_j0(x)


torch.fx.wrap("mine")


class Wrapped(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = nn.Linear(6, 8), nn.Linear(8, 8)

    def forward(self, x: Tensor) -> Tensor:
        return mine(self.b(torch.relu(self.a(x))))


def test_code_of_the_users_own_is_not_written(tmp_path: Path) -> None:
    model, x = Wrapped().eval(), torch.randn(2, 6)
    result = plain_merge(model, x)
    result.save(tmp_path / "o")
    with pytest.raises(FxMergeError, match=r"has no model.py: .*test_save.py:\d+.* calls \S*test_save.'mine', which"):
        fxmerge.load(tmp_path / "o")


def edited(folder: Path, **changes: str) -> None:
    """The weights' metadata with some entries changed."""
    from safetensors import safe_open

    with safe_open(folder / "weights.safetensors", framework="pt") as opened:
        metadata = {**opened.metadata(), **changes}
    save_file(load_file(folder / "weights.safetensors"), folder / "weights.safetensors", metadata)


def flipped(path: Path, at: int) -> None:
    data = bytearray(path.read_bytes())
    data[at] ^= 1
    path.write_bytes(bytes(data))


def cut(path: Path, size: int) -> None:
    path.write_bytes(path.read_bytes()[:size])


DAMAGE: dict[str, tuple[Callable[[Path], object], str]] = {
    "no folder": (lambda f: f.rename(f.with_name("gone")), r"is not a folder saved by fxmerge"),
    "no weights": (lambda f: (f / "weights.safetensors").unlink(), r"it has no weights.safetensors"),
    "no model.py": (lambda f: (f / "model.py").unlink(), r"model.py cannot be read"),
    "no plan": (lambda f: (f / "plan.json").unlink(), r"plan.json cannot be read"),
    "weights cut in the header": (lambda f: cut(f / "weights.safetensors", 20), r"weights.safetensors is damaged"),
    "weights cut in the tensors": (lambda f: cut(f / "weights.safetensors", -5), r"weights.safetensors is damaged"),
    "weights empty": (lambda f: cut(f / "weights.safetensors", 0), r"weights.safetensors is damaged"),
    "a bit of a tensor": (lambda f: flipped(f / "weights.safetensors", -3), r"its tensors differ from the saved ones"),
    "model.py cut": (lambda f: cut(f / "model.py", -30), r"model.py is not the file that was saved"),
    "model.py edited": (
        lambda f: flipped(f / "model.py", 700), r"model.py is not .* edited model.py, call its own load\(\)"
    ),
    "model.py not text": (lambda f: (f / "model.py").write_bytes(b"\xff\xfe"), r"model.py cannot be read"),
    "plan edited": (lambda f: flipped(f / "plan.json", 100), r"plan.json is not the file that was saved"),
    "weights of others": (
        lambda f: save_file({"a": torch.zeros(2)}, f / "weights.safetensors"), r"was not saved by fxmerge"
    ),
    "a newer version": (
        lambda f: edited(f, fxmerge_folder="2"), r"has format version 2, but this fxmerge reads version 1; update"
    ),
}  # fmt: skip


@pytest.mark.parametrize("what", DAMAGE)
def test_damaged_folders(what: str, tmp_path: Path) -> None:
    _, model = saved("residual", tmp_path / "o")
    damage, message = DAMAGE[what]
    assert fxmerge.load(tmp_path / "o") is not None
    damage(tmp_path / "o")
    with pytest.raises(FxMergeError, match=message) as caught:
        fxmerge.load(tmp_path / "o")
    assert "\n" not in str(caught.value)
    if "model.py" not in what:
        with pytest.raises(FxMergeError, match=message):
            fxmerge.load(tmp_path / "o", model=model)


@pytest.mark.parametrize(("text", "message"), [
    ("", "damaged"), ("[]", "record about the user's own class is damaged"),
    ('{"refused": ""}', "is damaged: KeyError"),
    ('{"refused": "", "attributes": {"a": 3}, "rows": {}, "unused": []}', "Net has no integer attribute a"),
])  # fmt: skip
def test_a_damaged_record_of_the_class(text: str, message: str, tmp_path: Path) -> None:
    _, model = saved("residual", tmp_path / "o")
    edited(tmp_path / "o", own_class=text)
    with pytest.raises(FxMergeError, match=message):
        fxmerge.load(tmp_path / "o", model=model)


@pytest.mark.parametrize(("model", "message"), [
    (lambda: NETS["dense"]()[0], r"Net has .*, which the merged model does not have; pass the model that was merged"),
    (lambda: plain_merge(*NETS["residual"](), ratio=0.75).module, r"GraphModule.* and .* in the merged model; pass"),
    (lambda: nn.Linear, r"model is a type, not a torch.nn.Module"),
])  # fmt: skip
def test_another_model_is_refused(model: Callable[[], Any], message: str, tmp_path: Path) -> None:
    saved("residual", tmp_path / "o")
    with pytest.raises(FxMergeError, match=message):
        fxmerge.load(tmp_path / "o", model=model())


def test_nothing_in_the_folder_is_run_for_the_users_class(tmp_path: Path) -> None:
    result, model = saved("residual", tmp_path / "o")
    (tmp_path / "o" / "model.py").write_text("raise SystemExit('this was run')")
    for name in ("__init__.py", "torch.py", "sitecustomize.py"):
        (tmp_path / "o" / name).write_text("raise SystemExit('this was run')")
    own = fxmerge.load(tmp_path / "o", model=other(model))
    assert difference(given(result, result.module), given(result, own)) <= 1e-5


def test_files_of_others_stay(tmp_path: Path) -> None:
    model, x = made("mlp")
    result = plain_merge(model, x)
    (tmp_path / "notes.txt").write_text("mine")
    with pytest.raises(FxMergeError, match=r"holds notes.txt, which fxmerge did not write; give a new or empty folder"):
        result.save(tmp_path)
    assert [p.name for p in tmp_path.iterdir()] == ["notes.txt"]
    with pytest.raises(FxMergeError, match=r"notes.txt is a file; give a folder"):
        result.save(tmp_path / "notes.txt")


def test_a_save_that_raises_leaves_the_old_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Without an atomic exchange the old folder is moved aside, and moved back if the new one cannot be moved in."""
    saved("mlp", tmp_path / "o")
    before = {p.name: p.read_bytes() for p in (tmp_path / "o").iterdir()}
    result = plain_merge(*made("residual"))
    monkeypatch.setattr("fxmerge.weights.files._exchange", lambda one, two: False)

    def fails(one: Any, two: Any) -> None:
        raise OSError("no space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(os, "rename", fails)
        with pytest.raises(OSError, match="no space"):
            result.save(tmp_path / "o")
    assert {p.name: p.read_bytes() for p in (tmp_path / "o").iterdir()} == before
    assert [p.name for p in tmp_path.iterdir()] == ["o"]
    result.save(tmp_path / "o")
    assert difference(given(result, result.module), given(result, fxmerge.load(tmp_path / "o"))) == 0
    assert [p.name for p in tmp_path.iterdir()] == ["o"]


def test_folders_are_not_exchanged_on_windows(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """There CDLL(None) raises a TypeError, which must not reach a second save."""

    def windows(name: Any, **kwargs: Any) -> None:
        raise TypeError("argument of type 'NoneType' is not iterable")

    with monkeypatch.context() as patch:
        patch.setattr(sys, "platform", "win32")
        patch.setattr(ctypes, "CDLL", windows)
        exchanged = _exchange(tmp_path / "one", tmp_path / "two")
    assert not exchanged


@pytest.mark.slow
def test_a_killed_save_leaves_the_old_folder_or_the_new_one(tmp_path: Path) -> None:
    """SIGKILL at each system call of a save over an existing folder."""
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(TESTS.parent)}
    program = [sys.executable, str(TESTS / "helpers" / "killed_saves.py"), str(tmp_path / "o")]
    done = subprocess.run(program, capture_output=True, text=True, env=environment, timeout=300)
    assert done.returncode == 0, done.stderr
    steps = [tuple(map(int, line.split())) for line in done.stdout.splitlines()]
    assert len(steps) > 20
    assert [status for _, status in steps] == [9] * (len(steps) - 1) + [0]
    model, x = NETS["residual"]()
    whole = [plain_merge(model, x, ratio=ratio).module(x) for ratio in (0.25, 0.5)]
    found = []
    for limit, _ in steps:
        folder = Path(f"{tmp_path / 'o'}-{limit}")
        out = fxmerge.load(folder)(x)  # checks that its files belong to one save
        found.append(next(i for i, w in enumerate(whole) if torch.allclose(w, out, atol=1e-6)))
    assert found == sorted(found)
    assert found[0] == 0
    assert found[-1] == 1


@pytest.mark.parametrize("name", ["m.onnx", "m.PT2", "m.pt", "m.safetensors"])
def test_a_folder_named_like_a_file(name: str, tmp_path: Path) -> None:
    result = plain_merge(*made("mlp"))
    with pytest.raises(FxMergeError, match=rf"{name} looks like a file, and result.save writes a folder; .*to_onnx or"):
        result.save(tmp_path / name)
    assert not list(tmp_path.iterdir())
    (tmp_path / name).mkdir()
    result.save(tmp_path / name)  # a folder that exists is meant


def test_what_hooks_do_is_written(tmp_path: Path) -> None:
    """A layer's hook is part of the graph, and so of the code."""
    model, x = Recurrent().eval(), torch.randn(2, 5, 6)
    model.a.register_forward_hook(lambda module, args, out: 2 * out)
    result = plain_merge(model, x)
    result.save(tmp_path / "o")
    unseen = torch.randn(3, 5, 6)
    torch.testing.assert_close(fxmerge.load(tmp_path / "o")(unseen), result.module(unseen))
    torch.testing.assert_close(plain_merge(model, x, ratio=0.0).module(unseen), model(unseen))


def test_keywords_in_the_code_of_torch_fx(tmp_path: Path) -> None:
    """A merged module with names that are keywords keeps working when it is recompiled, copied and merged again."""
    torch.manual_seed(0)
    model = nn.ModuleDict({"if": nn.Linear(6, 16), "a-b": nn.ModuleDict({"is": nn.Linear(16, 12), "x": nn.ReLU()})})
    model.register_parameter("None", nn.Parameter(torch.rand(12)))

    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.add_module("lambda", model)
            self.head = nn.Linear(12, 3)

        def forward(self, x: Tensor) -> Tensor:
            own: Any = getattr(self, "lambda")
            y = own["a-b"]["x"](own["a-b"]["is"](torch.relu(own["if"](x)))) * getattr(own, "None")
            out: Tensor = self.head(y)
            return out

    net, x = Net().eval(), torch.randn(4, 6)
    result = plain_merge(net, x, ratio=0.5)
    assert [g.name for g in result.plan.groups] == ["lambda.if", "lambda.a-b.is"]
    expected = result.module(x)
    copied = copy.deepcopy(result.module)
    copied.recompile()  # type: ignore[operator]
    assert torch.equal(copied(x), expected)
    again = plain_merge(copied, x, ratio=0.5)
    assert again.plan.groups
    again.save(tmp_path / "o")
    torch.testing.assert_close(fxmerge.load(tmp_path / "o")(x), again.module(x))
