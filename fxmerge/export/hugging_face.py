"""Saves a merged model of Hugging Face transformers as a folder that from_pretrained reads.

Where a configuration with other widths gives the same layers (intermediate_size, num_key_value_heads), the folder
holds a plain model that any engine reads. Otherwise, as where layers differ in width, it holds also a modelling file: a
subclass of the model's class that narrows its layers, and that from_pretrained(folder, trust_remote_code=True) finds
by auto_map. What is written is loaded and compared with the merged model.
"""

from __future__ import annotations

import copy
import json
import sys
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import nn

from fxmerge.errors import FxMergeError, first_line
from fxmerge.export.check import Expected
from fxmerge.export.hugging_face_code import CODE
from fxmerge.weights.files import write_folder, write_tensors, write_text

MODELLING, CONFIG = "modeling_fxmerge", "config.json"
KEY = "fxmerge"  # of the configuration: what the modelling file needs to know
BUILDS = 400  # of a model without weights, at most, to find a configuration
_FILES = {CONFIG, f"{MODELLING}.py", "model.safetensors", "generation_config.json"}
_TOKENIZER = {
    "added_tokens.json", "chat_template.jinja", "merges.txt", "preprocessor_config.json", "processor_config.json",
    "special_tokens_map.json", "tokenizer.json", "tokenizer.model", "tokenizer_config.json", "vocab.json", "vocab.txt",
}  # fmt: skip


def is_hugging_face(model: nn.Module | None) -> bool:
    """Is the model of a class of transformers, which has `save_pretrained`?"""
    library = sys.modules.get("transformers")
    return library is not None and isinstance(model, library.PreTrainedModel)


def save_pretrained(folder: Path, own: Any, original: Any, expected: Expected) -> None:
    """Writes the folder of a merged model in the class of the original.

    own:      the merged model in its own class
    expected: what it returns

    The write is atomic. Raises FxMergeError if the folder holds files that are neither written here nor a tokenizer's,
    or if the loaded model does not return what the merged model does.
    """
    plain = plain_model(own, original, expected)

    def fill(there: Path) -> None:
        if plain is not None:
            plain.save_pretrained(there)
        else:
            _write_with_code(there, own, original)
        if folder.is_dir():  # a tokenizer's files stay
            for path in folder.iterdir():
                if path.name in _TOKENIZER:
                    (there / path.name).write_bytes(path.read_bytes())
        confirmed(there, type(original), expected)

    known = _FILES | _TOKENIZER | {"model.safetensors.index.json"}
    parts = {p.name for p in folder.iterdir() if p.match("model-*-of-*.safetensors")} if folder.is_dir() else set()
    write_folder(folder, known | parts, fill)


def confirmed(folder: Path, kind: Any, expected: Expected) -> None:
    """Loads a folder as its user will, and raises FxMergeError if that is not the merged model."""
    config = json.loads((folder / CONFIG).read_text(encoding="utf-8"))
    try:
        if KEY in config:
            from transformers.dynamic_module_utils import get_class_from_dynamic_module

            kind = get_class_from_dynamic_module(f"{MODELLING}.Merged{kind.__name__}", str(folder))
        loaded = kind.from_pretrained(folder).eval()
    except Exception as error:
        raise FxMergeError(
            f"the saved model cannot be loaded by from_pretrained: {type(error).__name__}: {first_line(error)}; "
            "use result.save(folder), and please report this model"
        ) from error
    expected.confirm(loaded, "the model that from_pretrained loads")


def plain_model(own: Any, original: Any, expected: Expected) -> Any:
    """A model of the class, built from a configuration of other widths, with the merged weights; None if none fits."""
    config = plain_config(own, original)
    if config is None:
        return None
    try:
        made = type(original)(config)
        state = own.state_dict()
        for name, value in made.state_dict().items():
            state.setdefault(name, torch.zeros_like(value))  # biases of layers that have none, beside those that do
        made.load_state_dict(state)
        made.to(next(own.parameters()).dtype)
        made.generation_config = copy.deepcopy(getattr(own, "generation_config", None))
        return made.eval() if expected.error(made) <= 1 else None
    except Exception:  # transformers checks its configurations in many ways
        return None


def plain_config(own: Any, original: Any) -> Any:
    """The original's configuration with other numbers, by which its class has the shapes of the merged model; or None.

    Numbers are scaled as some axis of a tensor was, one after the other, as long as more shapes are right.
    """
    wanted = {name: tuple(value.shape) for name, value in own.state_dict().items()}
    config, left = copy.deepcopy(original.config), BUILDS
    if getattr(config, "head_dim", None) is None and hasattr(config, "hidden_size"):
        heads = getattr(config, "num_attention_heads", 0)
        if isinstance(heads, int) and heads and config.hidden_size % heads == 0:
            config.head_dim = config.hidden_size // heads
    shapes = _shapes(type(original), config)
    while shapes is not None and not _fits(shapes, wanted):
        best = _right(shapes, wanted)
        for place, number in _moves(config, shapes, wanted):
            left -= 1
            if left < 0:
                return None
            tried = copy.deepcopy(config)
            _put(tried, place, number)
            found = _shapes(type(original), tried)
            if found is not None and _right(found, wanted) > best:
                config, shapes = tried, found
                break
        else:
            return None
    return config if shapes is not None else None


Shapes = Mapping[str, tuple[int, ...]]
Place = tuple[str | int, ...]  # a path in a configuration: names of sub-configurations, a field, a place in a list


def _shapes(kind: Any, config: Any) -> Shapes | None:
    """The shapes of a model of this configuration; None if there is no such model."""
    try:
        with torch.device("meta"):
            return {name: tuple(v.shape) for name, v in kind(config).state_dict().items()}
    except Exception:
        return None


def _fits(shapes: Shapes, wanted: Shapes) -> bool:
    more = shapes.keys() - wanted.keys()
    return all(name.endswith("bias") for name in more) and all(shapes.get(n) == s for n, s in wanted.items())


def _right(shapes: Shapes, wanted: Shapes) -> int:
    """How many axes have the size that is wanted; a tensor that is there counts as one more."""
    pairs = [(shapes[name], shape) for name, shape in wanted.items() if name in shapes]
    extra = sum(name not in wanted for name in shapes)
    return sum(1 + sum(a == b for a, b in zip(one, other, strict=False)) for one, other in pairs) - extra


def _moves(config: Any, shapes: Shapes, wanted: Shapes) -> Iterator[tuple[Place, Any]]:
    """(place, number) for the integers of a configuration, scaled as axes were; flags for biases that are missing."""
    pairs = [(a, b) for n, s in wanted.items() if n in shapes for a, b in zip(shapes[n], s, strict=False) if a != b]
    ratios = sorted(set(pairs), key=lambda pair: -pairs.count(pair))
    for place, value in _numbers(config):
        if value is False and "bias" in str(place[-1]) and wanted.keys() - shapes.keys():
            yield place, True
        elif type(value) is int and value > 1:
            yield from ((place, value * b // a) for a, b in ratios if value * b % a == 0 and value == a)
    for place, value in _numbers(config):
        if type(value) is int and value > 1:
            yield from ((place, value * b // a) for a, b in ratios if value * b % a == 0 and value != a)


def _numbers(config: Any, path: Place = ()) -> Iterator[tuple[Place, Any]]:
    """(place, value) of the integers and flags of a configuration and of those inside it."""
    for name, value in list(vars(config).items()):
        if name.startswith("_") or name.endswith("_token_id") or name in ("vocab_size", KEY):
            continue
        if type(value) in (int, bool):
            yield (*path, name), value
        elif type(value) is list:
            yield from (((*path, name, i), v) for i, v in enumerate(value) if type(v) is int)
        elif hasattr(value, "to_dict") and hasattr(value, "model_type"):
            yield from _numbers(value, (*path, name))


def _put(config: Any, place: Place, number: Any) -> None:
    *inner, last = place
    for name in inner:
        config = getattr(config, name) if isinstance(name, str) else config[name]
    if isinstance(last, str):
        setattr(config, last, number)
    else:
        config[last] = number


def _write_with_code(there: Path, own: Any, original: Any) -> None:
    """Writes configuration, modelling file and weights of a model whose widths no configuration gives."""
    name = type(original).__name__
    autos = _auto_classes(original)
    before, after = dict(original.named_buffers()), dict(own.named_buffers())
    held = own.state_dict()
    buffers = {
        n: v
        for n, v in after.items()
        if n in before and (v.shape != before[n].shape or (n not in held and not torch.equal(v, before[n])))
    }
    had = dict(original.named_parameters(remove_duplicate=False))
    parameters = {
        n: list(p.shape)
        for n, p in own.named_parameters(remove_duplicate=False)
        if n not in had or had[n].shape != p.shape
    }
    config = copy.deepcopy(original.config)
    setattr(
        config, KEY,
        {
            "parameters": parameters,
            "buffers": {n: list(v.shape) for n, v in buffers.items()},
            "attributes": dict(_attributes(original, own)),
        },
    )  # fmt: skip
    config.architectures = [f"Merged{name}"]
    config.auto_map = dict.fromkeys(autos, f"{MODELLING}.Merged{name}")
    config.dtype = next(own.parameters()).dtype
    config.save_pretrained(there)
    if getattr(own, "generation_config", None) is not None:
        own.generation_config.save_pretrained(there)
    write_text(there / f"{MODELLING}.py", CODE.format(name=name, auto=autos[0] if autos else name))
    tied = _tied(own)
    write_tensors(
        there / "model.safetensors", {n: v for n, v in held.items() if n not in tied} | buffers, {"format": "pt"}
    )


def _tied(model: Any) -> set[str]:
    """The names of tensors that `tie_weights` makes from others, and that a file need not hold."""
    may = set(getattr(model, "all_tied_weights_keys", None) or getattr(model, "_tied_weights_keys", None) or ())
    named = dict(model.named_parameters(remove_duplicate=False))
    others = {id(value) for name, value in named.items() if name not in may}
    return {name for name in may if name in named and id(named[name]) in others}


def _auto_classes(model: Any) -> list[str]:
    """The names of the classes of transformers, such as AutoModelForCausalLM, that load a model of this class."""
    from transformers.models.auto import modeling_auto

    found = []
    for name, auto in vars(modeling_auto).items():
        mapping = getattr(auto, "_model_mapping", None)
        kinds = mapping.get(type(model.config), ()) if mapping is not None else ()
        if type(model) in (kinds if isinstance(kinds, (tuple, list)) else (kinds,)):
            found.append(name)
    return sorted(found, key=lambda name: ("Pretraining" in name or "PreTraining" in name, name))


def _attributes(before: nn.Module, after: nn.Module) -> Iterator[tuple[str, Any]]:
    """(path, value) of the numbers that the layers of one model keep and that are others in the other model."""
    theirs = dict(after.named_modules(remove_duplicate=False))
    for path, module in before.named_modules(remove_duplicate=False):
        now = vars(theirs[path]) if path in theirs else {}
        for name, value in vars(module).items():
            new = now.get(name, value)
            plain = new if isinstance(new, (tuple, list)) else (new,)
            if name.startswith("_") or type(new) is not type(value) or new == value:
                continue
            if type(value) in (int, tuple, list) and all(type(v) in (int, float, str) for v in plain):
                yield f"{path}.{name}".lstrip("."), new
