"""Record what fxmerge computes for many models, to prove that a refactoring does not change it.

    python -m benchmarks.coverage.record --out before          # on the old code
    python -m benchmarks.coverage.record --out after           # on the new code
    python -m benchmarks.coverage.record --compare before after

Each case is a folder with the plan, checksums of the merged weights, the generated code and the report. Plans,
checksums and code must be equal byte by byte; differences between reports are printed, but allowed. Everything runs on
one thread. Times differ from run to run and are not recorded. A case that is already in the folder is not run again.
"""

import argparse
import difflib
import fnmatch
import hashlib
import json
import re
import traceback
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import nn

import fxmerge
from benchmarks.coverage import zoo
from tests.helpers.nets import NETS

WIDE = 4000  # columns of a report, so that no line is wrapped
Case = Callable[[], tuple[nn.Module, Any, dict[str, Any]]]

PLAIN: Mapping[str, tuple[str, ...]] = {  # merged without refit
    "torchvision": (
        "resnet18", "resnet50", "vgg11_bn", "mobilenet_v2", "densenet121", "efficientnet_b0", "shufflenet_v2_x0_5",
        "squeezenet1_1", "googlenet", "vit_b_16", "swin_t", "regnet_y_400mf", "convnext_tiny",
        "fasterrcnn_mobilenet_v3_large_320_fpn", "lraspp_mobilenet_v3_large", "r3d_18",
    ),
    "timm": (
        "convnext_atto", "coat_tiny", "davit_tiny", "edgenext_xx_small", "ghostnet_050", "levit_128s", "nfnet_l0",
        "hrnet_w18_small", "gmlp_ti16_224", "mobilenetv3_small_050",
    ),
    "transformers": (
        "BertForSequenceClassification", "AlbertForSequenceClassification", "GPT2LMHeadModel", "GPTNeoForCausalLM",
        "LlamaForCausalLM", "OPTForCausalLM", "BloomForCausalLM", "GemmaForCausalLM", "MambaForCausalLM",
        "T5ForConditionalGeneration", "ViTForImageClassification", "SwinForImageClassification", "CLIPModel",
        "WhisperForConditionalGeneration", "Wav2Vec2ForCTC",
    ),
}  # fmt: skip
REFITTED = ("mlp", "residual", "dense", "depthwise", "encoder", "functional", "words", "unet", "projection", "gate")


def cases() -> dict[str, Case]:
    """Every case by name: models of the libraries, the nets of the tests, and options that take other code paths."""
    found: dict[str, Case] = {}
    for suite, names in PLAIN.items():
        known = zoo.names(suite)
        for name in names:
            if name in known:
                found[f"{suite}-{name}"] = _of_zoo(suite, name, refit="none")
    for name, decomposition in (("resnet18", "lstsq"), ("resnet18", "fold"), ("resnet18", "prune")):
        found[f"torchvision-{name}-{decomposition}"] = _of_zoo(
            "torchvision", name, refit="none", decomposition=decomposition, selection="l1"
        )
    found["torchvision-vit_b_16-both"] = _of_zoo("torchvision", "vit_b_16", refit="none", heads="both")
    found["torchvision-resnet18-flops"] = _of_zoo("torchvision", "resnet18", refit="none", budget={"flops": 0.6})
    for name in NETS:
        found[f"net-{name}"] = _of_net(NETS[name], refit="none", ratio=0.5)
    for name in REFITTED:
        found[f"net-{name}-refit"] = _of_net(NETS[name], samples=64)
        found[f"net-{name}-calibration"] = _of_net(NETS[name], batches=True)
        found[f"net-{name}-budget"] = _of_net(NETS[name], budget={"params": 0.6}, samples=32)
    for selection in ("l1", "gm", "random", "reprune", "reprune-kernel"):
        found[f"net-residual-{selection}"] = _of_net(NETS["residual"], refit="none", selection=selection)
    found["net-encoder-whole"] = _of_net(NETS["encoder"], refit="none", heads="whole")
    found["net-residual-internal"] = _of_net(NETS["residual"], refit="none", scope="internal")
    return found


def _of_zoo(suite: str, name: str, **options: Any) -> Case:
    def make() -> tuple[nn.Module, Any, dict[str, Any]]:
        specimen = zoo.build(suite, name)
        return specimen.model, specimen.inputs, options

    return make


def _of_net(make_net: Callable[[], tuple[nn.Module, Any]], batches: bool = False, **options: Any) -> Case:
    def make() -> tuple[nn.Module, Any, dict[str, Any]]:
        model, x = make_net()
        if batches:
            generator = torch.Generator().manual_seed(1)
            some = [
                torch.randn(x.shape, generator=generator)
                if x.is_floating_point()
                else torch.randint(int(x.max()) + 1, x.shape, generator=generator)
                for _ in range(16)
            ]
            return model, x, {**options, "calibration": some}
        return model, x, options

    return make


def record(folder: Path, case: Case) -> None:
    """Run one case and write its results to `folder`."""
    model, inputs, options = case()
    analysis = fxmerge.analyze(model, inputs)
    try:
        result = fxmerge.merge(model, inputs, **options)
    except fxmerge.FxMergeError as error:
        files = {"error.txt": str(error)}
    else:
        files = {
            "plan.json": result.plan.json(),
            "weights.txt": "".join(f"{name} {_checksum(t)}\n" for name, t in sorted(_tensors(result.module).items())),
            "code.txt": _code(result.module),
            "report.txt": result.report.text(width=WIDE),
            "report.json": result.report.json(),
        }
    files["analysis.txt"] = analysis.report.text(width=WIDE)
    files["analysis.json"] = analysis.report.json()
    temporary = folder.with_name(folder.name + ".part")
    temporary.mkdir(parents=True, exist_ok=True)
    for name, text in files.items():
        (temporary / name).write_text(_timeless(name, text), encoding="utf-8")
    temporary.rename(folder)


def _tensors(module: nn.Module) -> dict[str, torch.Tensor]:
    return dict(module.state_dict(keep_vars=True))


def _checksum(tensor: torch.Tensor) -> str:
    value = tensor.detach().contiguous().cpu()
    digest = hashlib.sha256(value.view(torch.uint8).numpy().tobytes() if value.dim() else value.numpy().tobytes())
    return f"{tuple(value.shape)} {value.dtype} {digest.hexdigest()}"


def _code(module: nn.Module) -> str:
    parts = [(n, m) for n, m in module.named_modules() if isinstance(m, torch.fx.GraphModule)]
    return "\n".join(f"# {name or 'the whole'}\n{part.code}" for name, part in parts)


def _timeless(name: str, text: str) -> str:
    """The text without seconds, and without the folders of source files."""
    text = re.sub(r"[\w./-]*/(?=[\w]+\.py:\d)", "", text)
    if not name.endswith(".json"):
        text = re.sub(r"\d+(\.\d+)? s\b", "N s", text)
        return re.sub(r"([ \u2500-\u257f])[ \u2500-\u257f]+", r"\1", text)  # tables are as wide as the removed text

    def strip(value: Any) -> Any:
        if isinstance(value, dict):
            return {k: strip(v) for k, v in value.items() if "second" not in k and k != "timing"}
        return [strip(v) for v in value] if isinstance(value, list) else value

    return json.dumps(strip(json.loads(text)), indent=1, sort_keys=True)


def compare(before: Path, after: Path) -> int:
    """Print every difference. Returns 1 if a plan, weights or code differ or if a case is missing, else 0."""
    wrong = 0
    names = sorted({p.name for folder in (before, after) for p in folder.iterdir() if p.is_dir()})
    differing = 0
    for name in names:
        one, other = before / name, after / name
        if not one.is_dir() or not other.is_dir():
            print(f"{name}: only in {before if one.is_dir() else after}")
            wrong += 1
            continue
        for file in sorted({p.name for folder in (one, other) for p in folder.iterdir()}):
            texts = [(f / file).read_text(encoding="utf-8") if (f / file).is_file() else "" for f in (one, other)]
            if texts[0] == texts[1]:
                continue
            hard = file in ("plan.json", "weights.txt", "code.txt")
            wrong, differing = wrong + hard, differing + 1
            print(f"{name}/{file} differs")
            lines = difflib.unified_diff(texts[0].splitlines(), texts[1].splitlines(), lineterm="", n=0)
            print("\n".join(f"    {line[:200]}" for line in list(lines)[2:12]))
    print(f"{len(names)} cases, {differing} files differ, {wrong} of them plans, weights or code")
    return int(wrong > 0)


def main() -> int:
    """The command line."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.coverage.record", description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, metavar="DIR", help="folder for the recorded cases")
    parser.add_argument("--only", default="*", help="only cases with a matching name (fnmatch)")
    parser.add_argument("--compare", type=Path, nargs=2, metavar=("BEFORE", "AFTER"), help="two recorded folders")
    options = parser.parse_args()
    if options.compare:
        return compare(*options.compare)
    if options.out is None:
        parser.error("pass --out DIR or --compare BEFORE AFTER")
    torch.set_num_threads(1)
    failed = []
    for name, case in cases().items():
        if not fnmatch.fnmatch(name, options.only) or (options.out / name).is_dir():
            continue
        print(name, flush=True)
        try:
            record(options.out / name, case)
        except Exception:
            traceback.print_exc()
            failed.append(name)
    if failed:
        print("not recorded:", *failed)
    return int(bool(failed))


if __name__ == "__main__":
    raise SystemExit(main())
