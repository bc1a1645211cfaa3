"""The models of benchmarks.coverage: all of torchvision, one of each timm family, and small transformers.

A model is identified by its suite and its name in the suite. Weights are random, from a fixed seed; nothing is
downloaded.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from benchmarks.coverage import zoo_timm, zoo_transformers
from fxmerge.graph.flop_counter import flop_counter


@dataclass(frozen=True)
class Specimen:
    """A model in eval mode and its inputs: a tuple of positional arguments, or a dict of keyword arguments."""

    model: nn.Module
    inputs: tuple[Any, ...] | dict[str, Any]

    def run(self) -> Any:
        """The output of the model for its inputs."""
        with torch.no_grad():
            return self.model(**self.inputs) if isinstance(self.inputs, dict) else self.model(*self.inputs)

    def flops(self) -> int:
        """The FLOPs of one run on the inputs."""
        with flop_counter() as counter:
            self.run()
        return int(counter.get_total_flops())


def torchvision_names() -> list[str]:
    """All models of torchvision. Names with quantized_ give the float model before quantisation."""
    from torchvision.models import list_models

    return list(list_models())


def torchvision_model(name: str) -> tuple[nn.Module, tuple[Any, ...]]:
    """A torchvision model with random weights, and inputs of its documented size; 320 pixels for detection."""
    from torchvision.models import get_model, get_model_builder, get_model_weights

    kind = get_model_builder(name).__module__.removeprefix("torchvision.models.").split(".")[0]
    image = torch.randn(1, 3, 224, 224)
    if name.startswith("quantized_"):
        aux = {"aux_logits": False, "init_weights": False}
        aux = aux if name in ("quantized_googlenet", "quantized_inception_v3") else {}
        return get_model(name, weights=None, quantize=False, **aux), (image,)
    if name == "inception_v3":
        return get_model(name, weights=None, aux_logits=False, init_weights=False), (torch.randn(1, 3, 299, 299),)
    if name == "googlenet":
        return get_model(name, weights=None, aux_logits=False, init_weights=False), (image,)
    if kind == "segmentation":
        return get_model(name, weights=None, weights_backbone=None), (image,)
    if kind == "optical_flow":
        return get_model(name, weights=None), (torch.rand(1, 3, 128, 128), torch.rand(1, 3, 128, 128))
    if kind == "detection":
        # with random weights no box reaches the default score, and empty outputs would hide errors
        sized = {} if name.startswith("ssd") else {"min_size": 320, "max_size": 320}
        threshold = "box_score_thresh" if "rcnn" in name else "score_thresh"
        model = get_model(name, weights=None, weights_backbone=None, **sized, **{threshold: 0.0})
        return model, ([torch.rand(3, 320, 320)],)
    if kind == "video":
        size = get_model_weights(name)["DEFAULT"].transforms().crop_size
        height, width = size if len(size) == 2 else (size[0], size[0])
        return get_model(name, weights=None), (torch.randn(1, 3, 16, height, width),)
    return get_model(name, weights=None), (image,)


Builder = Callable[[str], tuple[nn.Module, Any]]
SUITES: Mapping[str, tuple[Callable[[], list[str]], Builder]] = {
    "torchvision": (torchvision_names, torchvision_model),
    "timm": (zoo_timm.names, zoo_timm.model),
    "transformers": (zoo_transformers.names, zoo_transformers.model),
}


def names(suite: str) -> list[str]:
    """The names of the models of a suite. Raises ImportError if its package is not installed."""
    return SUITES[suite][0]()


def build(suite: str, name: str, seed: int = 0) -> Specimen:
    """One model with random weights and inputs; the same seed gives the same ones."""
    torch.manual_seed(seed)
    model, inputs = SUITES[suite][1](name)
    generator = torch.Generator().manual_seed(seed)
    specimen = Specimen(model.eval(), inputs)
    vary_constants(model, generator)
    vary_batch_norms(specimen, generator)
    return specimen


@torch.no_grad()
def vary_constants(model: nn.Module, generator: torch.Generator) -> None:
    """Give random values to parameters that are initialised to a constant.

    With equal values, zeros or scales of 1e-6 an exchange of two channels would not change the output.
    """
    for value in model.parameters():
        if value.is_floating_point() and value.numel() and bool((value == value.flatten()[0]).all()):
            value.copy_(varied(value, generator))


def varied(value: Tensor, generator: torch.Generator) -> Tensor:
    """Random values around those of a constant tensor. A tensor with one element only changes if it is zero."""
    constant = float(value.flatten()[0])
    if constant == 0:
        fan_in = max(value[0].numel(), 1) if value.dim() > 1 else 1
        spread = min(0.1, fan_in**-0.5)
        return torch.empty_like(value).normal_(spread if value.numel() == 1 else 0, spread, generator=generator)
    if value.numel() == 1:
        return value
    factor = torch.empty_like(value).uniform_(0.5, 1.5, generator=generator)
    return factor * (constant if abs(constant) >= 0.1 else 0.1)


@torch.no_grad()
def vary_batch_norms(specimen: Specimen, generator: torch.Generator) -> None:
    """Give each BatchNorm random statistics close to those of its input on the example.

    The statistics of a trained model fit its inputs. With others, activations grow from block to block until sigmoids
    saturate, which would hide errors.
    """

    def fit(module: nn.Module, args: tuple[Any, ...]) -> None:
        hooks.pop(module).remove()
        x, mean, var = args[0], module.running_mean, module.running_var
        assert isinstance(mean, Tensor) and isinstance(var, Tensor)
        if x.numel() >= 8 * x.size(1):
            found = torch.var_mean(x.transpose(0, 1).flatten(1), dim=1)
            var.mul_(found[0]).add_(1e-4)
            mean.mul_(var.sqrt()).add_(found[1])

    hooks: dict[nn.Module, Any] = {}
    for module in specimen.model.modules():
        mean, var = getattr(module, "running_mean", None), getattr(module, "running_var", None)
        if isinstance(mean, Tensor) and isinstance(var, Tensor):
            mean.normal_(0, 0.5, generator=generator)
            var.uniform_(0.5, 1.5, generator=generator)
            hooks[module] = module.register_forward_pre_hook(fit)
    if hooks:
        specimen.run()
        for hook in hooks.values():
            hook.remove()
