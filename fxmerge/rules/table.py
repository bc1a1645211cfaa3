"""RULES: what each op does to labels. One row for each mathematical op, with all of its spellings.

An op without a row pins everything that it touches: an unknown op is never taken for an elementwise one. `rule.py`
describes what a rule is. A spelling is a module class (`Module(cls, attributes)` if the rule takes attributes of the
module), a function, the name of a method, or the dotted name of a function of a library that may not be installed.

To add a rule for an op of your own:

    fxmerge.RULES["my_gate"] = fxmerge.per_channel("my_gate", MyGate, my_gate_function, commutes=False)
"""

from __future__ import annotations

import operator
from functools import partial

import torch
import torch.nn.functional as F
from torch import nn

from fxmerge.graph.ops import Aten
from fxmerge.rules import (
    binary,
    contractions,
    einsum,
    indexed,
    layers,
    movement,
    norms,
    over_axes,
    pointwise,
    products,
    shuffles,
    unary,
)
from fxmerge.rules.elementwise import (
    adds_nothing,
    averages,
    by_numerator,
    extreme,
    fills_with_zero,
    identity_rule,
    one_factor,
    per_channel,
    prelu_rule,
    reduction,
    sampled_rule,
    softmax_rule,
    spatial,
)
from fxmerge.rules.queries import constant_rule, passes_factor, query_rule, type_as_rule
from fxmerge.rules.recurrent import ROWS as RECURRENT_LAYERS
from fxmerge.rules.rule import Module, Rule

_CONV = ("weight", "bias", "stride", "padding", "dilation", "groups")
_TRANSPOSED = ("weight", "bias", "stride", "padding", "output_padding", "groups", "dilation")
_NORM = ("running_mean", "running_var", "weight", "bias", "eps")
_ROWS: tuple[Rule, ...] = (
    # producers: read the labels along their reduction axis and make new ones along their output axis
    Rule("linear", "producer", layers.linear, (Module(nn.Linear, ("weight", "bias")), F.linear),
         layers.adds_no_bias, layers.adds_no_bias),
    Rule(
        "conv",
        "producer",
        layers.conv,
        (
            *(Module(cls, _CONV) for cls in (nn.Conv1d, nn.Conv2d, nn.Conv3d)),
            *(F.conv1d, F.conv2d, F.conv3d),
        ),
        layers.same_filter,
    ),
    Rule(
        "conv_transpose",
        "producer",
        layers.conv_transpose,
        (
            *(Module(cls, _TRANSPOSED) for cls in (nn.ConvTranspose1d, nn.ConvTranspose2d, nn.ConvTranspose3d)),
            *(F.conv_transpose1d, F.conv_transpose2d, F.conv_transpose3d),
        ),
        layers.same_filter,
    ),
    Rule("embedding", "producer", layers.embedding, (Module(nn.Embedding, ("weight", "max_norm")), F.embedding)),
    Rule("embedding_bag", "producer", layers.embedding_bag,
         (Module(nn.EmbeddingBag, ("weight", "max_norm")), F.embedding_bag)),
    # recurrent layers: producers that read themselves
    *RECURRENT_LAYERS,
    # contractions: the labels of both operands along the contracted axis are tied
    Rule("matmul", "contraction", contractions.matmul, (operator.matmul, torch.matmul, "matmul", torch.bmm, "bmm",
                                                          torch.mm, "mm"), linear=True),
    Rule("outer", "contraction", contractions.outer, (torch.outer, torch.ger)),
    Rule("addmm", "producer", contractions.addmm, (torch.addmm, "addmm")),
    Rule("baddbmm", "contraction", contractions.baddbmm, (torch.baddbmm, "baddbmm")),
    Rule("einsum", "contraction", einsum.einsum, (torch.einsum, torch.functional.einsum), linear=True),
    Rule("attention", "contraction", contractions.attention, (F.scaled_dot_product_attention,), linear=True),
    # layers with per-channel parameters, which follow the labels
    Rule(
        "batch_norm",
        "per_channel_param",
        norms.batch_norm,
        (*(Module(cls, _NORM) for cls in (nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d)), F.batch_norm),
        commutes=norms.by_channel,  # by its affine map, which planning/channel_ops.py applies exactly
    ),
    Rule(
        "prelu",
        "per_channel_param",
        prelu_rule,
        (Module(nn.PReLU, ("weight",)), F.prelu, torch.prelu, "prelu"),
        commutes=True,
    ),
    Rule(
        "instance_norm",
        "per_channel_param",
        norms.instance_norm,
        (*(Module(c, _NORM) for c in (nn.InstanceNorm1d, nn.InstanceNorm2d, nn.InstanceNorm3d)), F.instance_norm),
        commutes=norms.by_channel,  # as batch_norm
    ),
    # ties: the labels of two operands are tied, position by position
    Rule("add", "tie", binary.elementwise, (operator.add, operator.iadd, torch.add, "add", "add_"), adds_nothing,
         adds_nothing),
    Rule(
        "sub",
        "tie",
        binary.elementwise,
        (operator.sub, operator.isub, torch.sub, torch.subtract, "sub", "sub_"),
        adds_nothing,
        adds_nothing,
    ),
    Rule(
        "mul",
        "tie",
        binary.elementwise,
        (operator.mul, operator.imul, torch.mul, torch.multiply, "mul", "mul_"),
        one_factor,
        linear=True,
    ),
    Rule(
        "div",
        "tie",
        binary.elementwise,
        (operator.truediv, operator.itruediv, torch.div, torch.true_divide, torch.divide, "div", "div_"),
        one_factor,
        by_numerator,
    ),
    Rule("rsub", "tie", binary.elementwise, (torch.rsub,)),
    Rule("maximum", "tie", binary.elementwise, (torch.maximum, "maximum")),
    Rule("minimum", "tie", binary.elementwise, (torch.minimum, "minimum")),
    *pointwise.ROWS,
    Rule("where", "tie", binary.choose, (torch.where, "where")),
    Rule("compare", "tie", binary.elementwise,
         (operator.eq, operator.ne, operator.lt, operator.le, operator.gt, operator.ge, torch.eq, torch.ne, torch.lt,
          torch.le, torch.gt, torch.ge, "eq", "ne", "lt", "le", "gt", "ge")),
    Rule("addcmul", "tie", binary.addcmul, (torch.addcmul, "addcmul", "addcmul_")),
    Rule("glu", "tie", binary.glu, (Module(nn.GLU, ("dim",)), F.glu)),
    Rule("masked_fill", "tie", binary.masked_fill, (torch.masked_fill, "masked_fill", "masked_fill_"),
         linear=fills_with_zero),
    # activations with f(s x) = s f(x) for s > 0
    per_channel("relu", nn.ReLU, F.relu, F.relu_, torch.relu, torch.relu_, "relu", "relu_", commutes=True),
    per_channel("leaky_relu", nn.LeakyReLU, F.leaky_relu, F.leaky_relu_, commutes=True),
    per_channel("rrelu", nn.RReLU, F.rrelu, commutes=True),
    Rule("identity", "per_channel", identity_rule,
         (nn.Identity, "contiguous", "clone", torch.clone, "detach", "float", "double", "half", "bfloat16", "to", "cpu",
          "cuda", Aten("alias"), Aten("lift_fresh_copy"), Aten("_to_copy")), True, True),
    per_channel("stochastic_depth", "torchvision.ops.stochastic_depth.stochastic_depth", commutes=True, linear=True),
    per_channel("zeros_like", torch.zeros_like, commutes=True),
    per_channel("ones_like", torch.ones_like),
    per_channel("full_like", torch.full_like),
    per_channel("empty_like", torch.empty_like),
    per_channel("random_like", torch.rand_like, torch.randn_like, torch.randint_like),
    per_channel("dropout", nn.Dropout, nn.Dropout1d, nn.Dropout2d, nn.Dropout3d, nn.AlphaDropout,
                nn.FeatureAlphaDropout, F.dropout, F.dropout1d, F.dropout2d, F.dropout3d, F.alpha_dropout,
                F.feature_alpha_dropout, torch.dropout, commutes=True, linear=True),
    # activations for which this does not hold
    per_channel("relu6", nn.ReLU6, F.relu6),
    per_channel("hardtanh", nn.Hardtanh, F.hardtanh),
    per_channel("gelu", nn.GELU, F.gelu),
    per_channel("silu", nn.SiLU, F.silu),
    per_channel("mish", nn.Mish, F.mish),
    per_channel("elu", nn.ELU, F.elu, F.elu_),
    per_channel("celu", nn.CELU, F.celu),
    per_channel("selu", nn.SELU, F.selu),
    per_channel("logsigmoid", nn.LogSigmoid, F.logsigmoid),
    per_channel("hardsigmoid", nn.Hardsigmoid, F.hardsigmoid),
    per_channel("hardswish", nn.Hardswish, F.hardswish),
    per_channel("softplus", nn.Softplus, F.softplus),
    per_channel("softsign", nn.Softsign, F.softsign),
    per_channel("softshrink", nn.Softshrink, F.softshrink),
    per_channel("hardshrink", nn.Hardshrink, F.hardshrink),
    per_channel("tanhshrink", nn.Tanhshrink, F.tanhshrink),
    per_channel("threshold", nn.Threshold, F.threshold),
    *unary.ROWS,
    # pooling and interpolation: spatial axes change, channels do not
    spatial("avg_pool", nn.AvgPool1d, nn.AvgPool2d, nn.AvgPool3d, F.avg_pool1d, F.avg_pool2d, F.avg_pool3d,
            commutes=True, linear=True),
    spatial("max_pool", nn.MaxPool1d, nn.MaxPool2d, nn.MaxPool3d, F.max_pool1d, F.max_pool2d, F.max_pool3d,
            torch.max_pool1d, torch.max_pool2d, torch.max_pool3d, commutes=True),
    spatial("lp_pool", nn.LPPool1d, nn.LPPool2d, F.lp_pool1d, F.lp_pool2d, commutes=True),
    spatial("adaptive_pool", nn.AdaptiveAvgPool1d, nn.AdaptiveAvgPool2d, nn.AdaptiveAvgPool3d,
            nn.AdaptiveMaxPool1d, nn.AdaptiveMaxPool2d, nn.AdaptiveMaxPool3d, F.adaptive_avg_pool1d,
            F.adaptive_avg_pool2d, F.adaptive_avg_pool3d, F.adaptive_max_pool1d, F.adaptive_max_pool2d,
            F.adaptive_max_pool3d, torch.adaptive_avg_pool1d, commutes=True, linear=averages),
    spatial("interpolate", nn.Upsample, nn.UpsamplingNearest2d, nn.UpsamplingBilinear2d, F.interpolate,
            F.upsample, Aten("upsample_bilinear2d"), Aten("upsample_nearest2d"), Aten("upsample_bicubic2d"),
            Aten("_upsample_bicubic2d_aa"), commutes=True, linear=True),
    reduction("mean", torch.mean, "mean", commutes=True, linear=True),
    reduction("sum", torch.sum, "sum", commutes=True, linear=True),
    extreme("max", torch.max, "max"),
    extreme("min", torch.min, "min"),
    extreme("median", torch.median, "median"),
    reduction("amax", torch.amax, "amax", commutes=True),
    reduction("amin", torch.amin, "amin", commutes=True),
    reduction("var", torch.var, "var"),
    reduction("std", torch.std, "std", commutes=True),
    reduction("logsumexp", torch.logsumexp, "logsumexp"),
    *over_axes.ROWS,
    # mixers: without one channel, the others change
    Rule("softmax", "mixer", softmax_rule,
         (*(Module(cls, ("dim",)) for cls in (nn.Softmax, nn.LogSoftmax, nn.Softmin)), F.softmax, F.log_softmax,
          F.softmin, torch.softmax, torch.log_softmax, "softmax", "log_softmax")),
    Rule("softmax2d", "mixer", partial(softmax_rule, dim=-3), (Module(nn.Softmax2d),)),
    Rule("norm", "mixer", norms.norm,
         (torch.linalg.vector_norm, torch.norm, "norm", torch.functional.norm, Aten("linalg_vector_norm"),
          torch.linalg.norm)),
    *products.ROWS,
    Rule("normalize", "mixer", norms.normalize, (F.normalize,)),
    Rule("layer_norm", "mixer", norms.layer_norm,
         (Module(nn.LayerNorm, ("normalized_shape", "weight", "bias", "eps")), F.layer_norm, torch.layer_norm)),
    Rule("rms_norm", "mixer", norms.rms_norm,
         (*([Module(nn.RMSNorm, ("normalized_shape", "weight"))] if hasattr(nn, "RMSNorm") else []),
          *([F.rms_norm] if hasattr(F, "rms_norm") else []))),
    Rule("group_norm", "mixer", norms.group_norm,
         (Module(nn.GroupNorm, ("num_groups", "weight", "bias", "eps")), F.group_norm)),
    # movement: executed on the labels
    *(Rule(name, "movement", movement.execute, spellings, True) for name, spellings in movement.SPELLINGS.items()),
    Rule("channel_shuffle", "movement", shuffles.channel_shuffle,
         (Module(nn.ChannelShuffle, ("groups",)), torch.channel_shuffle), True),
    Rule("pixel_shuffle", "per_channel", shuffles.pixel_shuffle,
         (Module(nn.PixelShuffle, ("upscale_factor",)), torch.pixel_shuffle), True),
    Rule("fold", "per_channel", shuffles.fold, (nn.Fold, F.fold, Aten("col2im")), True),
    Rule("type_as", "per_channel", type_as_rule, ("type_as",), True),
    Rule("expand_as", "movement", movement.expand_as, ("expand_as",), True),
    Rule("enter", "movement", movement.entered, (movement.enter,), True),
    *indexed.ROWS,
    Rule("sampled", "per_channel", sampled_rule,
         (F.grid_sample, Aten("grid_sampler"), Aten("torchvision::roi_align")), True),
    Rule("pad", "per_channel", movement.pad, (F.pad,), True, movement.pads_with_zero),
    # shapes and other plain values
    Rule("new", "query", constant_rule, ("new_zeros", "new_ones", "new_full", "new_empty", "new_tensor",
                                         torch.zeros, torch.ones, torch.full, torch.empty)),
    Rule("random", "query", constant_rule, (torch.rand, torch.randn, torch.randint)),
    Rule("query", "query", query_rule, (getattr, "size", "dim", "ndimension", "numel", "stride", "get_device",
                                        "is_floating_point", "element_size", torch.numel, len,
                                        torch.is_tensor, torch._assert, Aten("sym_size")), passes_factor),
)  # fmt: skip
RULES: dict[str, Rule] = {row.name: row for row in _ROWS}
