"""Prune one model with Torch-Pruning as its own examples do: the peer of benchmarks.coverage and benchmarks.real.

MagnitudePruner with GroupMagnitudeImportance, and a uniform ratio unless stated otherwise. Classifiers are not pruned,
nor are the heads that its torchvision script ignores. As in its timm and transformers examples, the pruner is given the
number of attention heads of each layer, and after pruning the attributes are updated that the forward pass depends on.
"""

import itertools
from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from benchmarks.coverage.zoo import Specimen
from fxmerge.graph.nested import leaves

CLASSES = {"torchvision": (1000, 400, 91, 21)}
# ignored by its torchvision script, and the corresponding parts of models that the script does not cover
HEADS = (
    "head", "rpn.head.cls_logits", "rpn.head.bbox_pred", "backbone.fpn", "roi_heads", "update_block.flow_head",
    "mask_predictor",
)  # fmt: skip
SEPARATE = (("query", "key", "value"), ("q_proj", "k_proj", "v_proj"), ("q_lin", "k_lin", "v_lin"), ("q", "k", "v"))

STEPS, MOST = 100, 0.9  # of pruning to a budget: number of steps; largest share that a layer loses


def ignored(model: nn.Module, suite: str) -> list[nn.Module]:
    """The layers that are not pruned: classifiers, and the heads of detectors."""
    classes = CLASSES.get(suite, (getattr(model, "num_classes", -1), getattr(model, "num_labels", -1)))
    found: list[nn.Module] = []
    for module in model.modules():
        width = getattr(module, "out_features", getattr(module, "out_channels", None))
        if isinstance(module, nn.Linear | nn.Conv2d) and width in classes:
            found.append(module)
        if isinstance(module, nn.modules.linear.NonDynamicallyQuantizableLinear):
            found.append(module)  # the output projection of nn.MultiheadAttention
    if suite == "torchvision":
        named = dict(model.named_modules())
        detects = any(name in named for name in ("backbone", "update_block"))
        found += [named[name] for name in HEADS if detects and name in named]
    if suite == "transformers":
        out: Any = model.get_output_embeddings() if hasattr(model, "get_output_embeddings") else None
        found += [out] if out is not None else []
    return found


def attention(model: nn.Module) -> tuple[dict[nn.Module, int], list[nn.Module]]:
    """The number of heads of each layer that produces queries, keys or values; the modules that contain them."""
    heads: dict[nn.Module, int] = {}
    holders = []
    config = getattr(model, "config", None)
    for module in model.modules():
        number = next(
            (getattr(module, n) for n in ("num_heads", "num_attention_heads", "n_heads") if hasattr(module, n)), None
        )
        triple = next((t for t in SEPARATE if all(isinstance(getattr(module, n, None), nn.Linear) for n in t)), None)
        if number is None and triple:
            number = getattr(config, "num_attention_heads", None)
        if not isinstance(number, int):
            continue
        if isinstance(getattr(module, "qkv", None), nn.Linear | nn.Conv2d):
            heads[module.qkv] = number
        elif triple:
            q, k, v = (getattr(module, name) for name in triple)
            size = q.out_features // number
            heads |= {q: number, k: k.out_features // size, v: v.out_features // size}
        else:
            continue
        holders.append(module)
    return heads, holders


def update_sizes(model: nn.Module, holders: list[nn.Module], heads: dict[nn.Module, int]) -> None:
    """Set the size attributes of attention modules, and of torchvision's ViT, to the new widths."""
    for module in holders:
        if isinstance(getattr(module, "qkv", None), nn.Module):
            qkv: Any = module.qkv
            out = qkv.out_features if isinstance(qkv, nn.Linear) else qkv.out_channels
            module.num_heads = heads[qkv]
            sizes = {"head_dim": out // (3 * heads[qkv]), "attn_dim": out // 3}
        else:
            names = next(t for t in SEPARATE if hasattr(module, t[0]))
            q, k = (getattr(module, name) for name in names[:2])
            size = q.out_features // heads[q]
            sizes = {"head_dim": size, "attention_head_size": size, "all_head_size": q.out_features,
                     "inner_dim": q.out_features, "key_value_proj_dim": size,
                     "num_key_value_groups": heads[q] // heads[k]}  # fmt: skip
        for name, value in sizes.items():
            if isinstance(getattr(module, name, None), int):
                setattr(module, name, value)
    if hasattr(model, "hidden_dim") and hasattr(model, "conv_proj"):
        model.hidden_dim = model.conv_proj.out_channels


def flat(out: Any) -> list[Tensor]:
    """The tensors of an output that have a gradient."""
    return [v for v in leaves(out) if isinstance(v, Tensor) and v.grad_fn is not None]


def prune(specimen: Specimen, suite: str, ratio: float, ignore: Sequence[nn.Module] = ()) -> None:
    """Prune the model in place, every layer by the same ratio. Errors of Torch-Pruning are not caught.

    ignore: layers that are left alone, in addition to classifiers and heads
    """
    next(_steps(specimen, suite, ratio, ignore))


def prune_to_flops(
    specimen: Specimen, suite: str, share: float, together: bool = False, *, ignore: Sequence[nn.Module] = ()
) -> None:
    """Prune the model in place until at most this share of the FLOPs is left, in small steps as in its CIFAR script.

    together: rank the channels of all layers together (`global_pruning`)
    """
    whole = specimen.flops()
    settings = {"global_pruning": together, "iterative_steps": STEPS, "max_pruning_ratio": MOST}
    for _ in itertools.islice(_steps(specimen, suite, MOST, ignore, **settings), STEPS):
        if specimen.flops() <= share * whole:
            return
    raise ValueError(f"{specimen.flops() / whole:.0%} of the FLOPs are left after all steps, more than {share:.0%}")


def _steps(
    specimen: Specimen, suite: str, ratio: float, ignore: Sequence[nn.Module], **settings: Any
) -> Iterator[None]:
    """Prune the model in place, step by step, until a ratio is reached."""
    import torch_pruning as tp

    if suite == "timm":  # as in its timm example: fused attention hides queries, keys and values
        for module in specimen.model.modules():
            if isinstance(getattr(module, "fused_attn", None), bool | int):
                module.fused_attn = False
    model, inputs = specimen.model, specimen.inputs
    for parameter in model.parameters():
        parameter.requires_grad_(True)
    heads, holders = attention(model)
    vit = type(model).__module__ == "torchvision.models.vision_transformer"
    config = getattr(model, "config", None)
    # its example of language models prunes whole heads, since rotary embeddings need the head width
    rotary = hasattr(config, "rope_parameters") or hasattr(config, "rotary_dim")
    with torch.enable_grad():
        pruner = tp.pruner.MagnitudePruner(
            model,
            inputs if isinstance(inputs, dict) else inputs[0] if len(inputs) == 1 else inputs,
            importance=tp.importance.GroupMagnitudeImportance(),
            pruning_ratio=ratio,
            ignored_layers=[*ignored(model, suite), *ignore],
            num_heads=heads,
            in_channel_groups={},
            out_channel_groups={},
            prune_num_heads=rotary,
            prune_head_dims=not rotary,
            head_pruning_ratio=ratio if rotary else 0.0,
            round_to=model.encoder.layers[0].num_heads if vit else None,  # type: ignore[union-attr,index]
            forward_fn=_forward,
            output_transform=flat,
            **settings,
        )
    while True:
        with torch.enable_grad():
            pruner.step()
        update_sizes(model, holders, pruner.num_heads)
        yield


def _forward(model: nn.Module, inputs: Any) -> Any:
    if isinstance(inputs, dict):
        return model(**inputs)
    return model(*inputs) if isinstance(inputs, tuple) else model(inputs)
