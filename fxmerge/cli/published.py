"""The models of torchvision and timm: their published weights, and the preprocessing that goes with them."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch import nn

from fxmerge.errors import FxMergeError, first_line

ORIGINS = {"torchvision": "torchvision.models", "timm": "timm"}  # word before the colon -> module


def create(origin: str, module: Any, name: str, pretrained: bool) -> nn.Module:
    """A model by its name, with random or with published weights. Raises FxMergeError if there are none to be had."""
    known = not pretrained or (
        list(module.get_model_weights(name)) if origin == "torchvision" else module.is_model_pretrained(name)
    )
    if not known:
        raise FxMergeError(f"{origin} has no weights for {name}; give --weights FILE")
    try:
        if origin == "torchvision":
            model: nn.Module = module.get_model(name, weights="DEFAULT" if pretrained else None)
        else:
            model = module.create_model(name, pretrained=pretrained)
        return model
    except Exception as error:
        if not pretrained or not _of_network(error):
            raise
        raise FxMergeError(
            f"the weights of {origin}:{name} cannot be downloaded: {first_line(error)}; without a network, copy them "
            "to a file and give --weights FILE"
        ) from error


def transform(origin: str, module: Any, name: str, model: nn.Module) -> Callable[[Any], Any] | None:
    """The preprocessing of a PIL image for the published weights; None if the model has none."""
    if origin == "torchvision":
        weights = list(module.get_model_weights(name))
        made: Callable[[Any], Any] | None = module.get_model_weights(name).DEFAULT.transforms() if weights else None
        return made
    chain: Callable[[Any], Any] = module.data.create_transform(**module.data.resolve_model_data_config(model))
    return chain


_OF_NETWORK = ("EntryNotFoundError", "HTTPError", "ConnectError")  # of huggingface_hub and httpx


def _of_network(error: BaseException) -> bool:
    """Whether an exception, or one that it was raised from, is about the network or about a file that is not there."""
    seen: BaseException | None = error
    while seen is not None:
        if isinstance(seen, OSError) or type(seen).__name__.endswith(
            ("EntryNotFoundError", "HTTPError", "ConnectError")
        ):
            return True
        seen = seen.__cause__ or seen.__context__
    return False
