"""Recognizes quantized models, whose packed weights cannot be merged."""

from __future__ import annotations

from torch import fx, nn

from fxmerge.errors import FxMergeError

_MODULES = ("torch.ao.nn.", "torch.ao.quantization.", "torchao.", "bitsandbytes.")
_OBSERVING = "fused_moving_avg_obs_fake_quant"  # what a prepared model becomes in an exported graph
_TENSORS = ("torchao.", "bitsandbytes.")
# parts of models that can be quantized, which compute in floating point until then
_PLAIN = ("QuantStub", "DeQuantStub", "QuantWrapper", "FloatFunctional", "FXFloatFunctional")


def check_not_quantized(model: nn.Module) -> None:
    """Raises FxMergeError for a model that is quantized, or prepared for it by observers or fake quantization."""
    for path, module in model.named_modules():
        kind = type(module)
        if kind.__module__.startswith(_MODULES) and kind.__name__ not in _PLAIN:
            raise _error(path, f"{kind.__module__}.{kind.__name__}")
    for path, value in [*model.named_parameters(), *model.named_buffers()]:
        if value.is_quantized or type(value).__module__.startswith(_TENSORS):
            raise _error(path, type(value).__name__)
    for node in model.graph.nodes if isinstance(model, fx.GraphModule) else ():
        if _OBSERVING in str(node.target):
            raise _error(node.name, f"call of {node.target}")


def _error(path: str, kind: str) -> FxMergeError:
    return FxMergeError(
        f"{path or 'the model'} is a {kind}: this model is quantized or prepared for quantization; merge the model in "
        "floating point first, and quantize result.module afterwards"
    )
