"""The models of benchmarks.integration, with random weights: Hugging Face, YOLO, detection and timm."""

import os
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import nn

from benchmarks.coverage import zoo, zoo_transformers
from benchmarks.coverage.zoo_transformers import GQA, VIT

MORE: Mapping[str, tuple[dict[str, Any], str]] = {  # architectures that benchmarks.coverage does not have
    "Qwen3ForCausalLM": (GQA | {"head_dim": 16}, "text"),
    "Gemma3ForCausalLM": (GQA | {"head_dim": 16, "sliding_window": 8}, "text"),
    "Dinov2ForImageClassification": (VIT, "image"),
}
HUGGING_FACE = (
    "BertForSequenceClassification", "RobertaForSequenceClassification", "DistilBertForSequenceClassification",
    "GPT2LMHeadModel", "GPTNeoXForCausalLM", "OPTForCausalLM", "LlamaForCausalLM", "MistralForCausalLM",
    "Qwen2ForCausalLM", "Qwen3ForCausalLM", "Gemma3ForCausalLM", "PhiForCausalLM", "T5ForConditionalGeneration",
    "WhisperForConditionalGeneration", "ViTForImageClassification", "Dinov2ForImageClassification", "CLIPModel",
    "SwinForImageClassification",
)  # fmt: skip
YOLO = ("yolov5n", "yolov8n", "yolov10n", "yolo11n")
DETECTION = (
    "fasterrcnn_mobilenet_v3_large_320_fpn", "fasterrcnn_resnet50_fpn", "fcos_resnet50_fpn", "maskrcnn_resnet50_fpn",
    "retinanet_resnet50_fpn", "ssdlite320_mobilenet_v3_large",
)  # fmt: skip
TIMM = (
    "convnext_atto", "deit_tiny_patch16_224", "efficientnet_lite0", "ghostnet_050", "mobilenetv3_small_050",
    "regnetx_002", "repvit_m0_9", "resnet10t", "swin_s3_tiny_224", "vit_tiny_patch16_224",
)  # fmt: skip


def _hugging_face(name: str) -> tuple[nn.Module, Any]:
    import transformers

    if name in zoo_transformers.ARCHITECTURES:
        model, inputs = zoo_transformers.model(name)
    else:
        fields, kind = MORE[name]
        cls = getattr(transformers, name)
        model, inputs = cls(cls.config_class(**fields)), zoo_transformers.INPUTS[kind]()
    if "ForCausalLM" in name:
        model.config.use_cache = True
    return model, {k: torch.cat([v, v.flip(-1)]) for k, v in inputs.items()}  # two samples


def _yolo(name: str) -> tuple[nn.Module, Any]:
    os.environ.setdefault("YOLO_OFFLINE", "true")
    import ultralytics

    return ultralytics.YOLO(f"{name}.yaml").model, (torch.rand(2, 3, 96, 96),)


def _timm(name: str) -> tuple[nn.Module, Any]:
    import timm

    model = timm.create_model(name)
    return model, (torch.randn(2, *model.default_cfg["input_size"]),)


KINDS: Mapping[str, tuple[tuple[str, ...], Callable[[str], tuple[nn.Module, Any]]]] = {
    "Hugging Face": (HUGGING_FACE, _hugging_face),
    "YOLO": (YOLO, _yolo),
    "detection": (DETECTION, zoo.torchvision_model),
    "timm": (TIMM, _timm),
}
