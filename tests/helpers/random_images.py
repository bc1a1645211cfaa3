"""Steps of random nets for images, tokens and flat features, and from one kind to another."""

from __future__ import annotations

from tests.helpers.random_steps import Draft, even, step


@step("image")
def convolution(d: Draft) -> None:
    x, out, stride = d.x, d.width(), d.one(1, 2) if d.x.side > 2 else 1
    kernel, bias = d.one(3, 1), d.one(True, False)
    mode = d.one("zeros", "reflect") if x.side > 2 else "zeros"
    made = f"nn.Conv2d({x.c}, {out}, {kernel}, {stride}, {kernel // 2}, bias={bias}, padding_mode={mode!r})"
    side = (x.side - 1) // stride + 1
    d.put(f"{d.part(made)}({x.name})", "image", x.shape[0], out, side, side)


@step("image")
def depthwise(d: Draft) -> None:
    times = d.one(1, 2) if d.x.c <= 12 else 1
    d.copied |= times == 2
    made = f"nn.Conv2d({d.x.c}, {d.x.c * times}, 3, padding=1, groups={d.x.c})"
    d.widened(f"{d.part(made)}({d.x.name})", d.x.c * times)


@step("image", able=even)
def grouped(d: Draft) -> None:
    out = d.width()
    d.widened(f"{d.part(f'nn.Conv2d({d.x.c}, {out}, 1, groups=2)')}({d.x.name})", out)


@step("image", able=lambda d: d.x.side <= 8)
def transposed(d: Draft) -> None:
    out = d.width()
    made = d.part(f"nn.ConvTranspose2d({d.x.c}, {out}, 2, 2)")
    d.put(f"{made}({d.x.name})", "image", d.x.shape[0], out, 2 * d.x.side, 2 * d.x.side)


@step("image")
def batch_norm(d: Draft) -> None:
    d.same(f"{d.part(f'nn.BatchNorm2d({d.x.c}, affine={d.one(True, False)})')}({d.x.name})")


@step("image")
def other_norm(d: Draft) -> None:
    c = d.x.c
    made = d.one("nn.GroupNorm(1, {})", "nn.InstanceNorm2d({}, affine=True)", *["nn.GroupNorm(2, {})"] * (c % 2 == 0))
    d.same(f"{d.part(made.format(c))}({d.x.name})")


@step("image")
def channels_last_norm(d: Draft) -> None:
    d.same(f"{d.part(f'nn.LayerNorm({d.x.c})')}({d.x.name}.permute(0, 2, 3, 1)).permute(0, 3, 1, 2)")


@step("tokens", "flat")
def norm(d: Draft) -> None:
    made = ["nn.LayerNorm({})", "nn.RMSNorm({})"] + ["nn.BatchNorm1d({})"] * (d.x.kind == "flat")
    d.same(f"{d.part(d.one(*made).format(d.x.c))}({d.x.name})")


@step("image")
def prelu(d: Draft) -> None:
    d.same(f"{d.part(f'nn.PReLU({d.one(d.x.c, 1)})')}({d.x.name})")


@step("image", able=lambda d: d.x.side % 2 == 0 and d.x.side > 1)
def pooled(d: Draft) -> None:
    x, half = d.x, d.x.side // 2
    code = d.one("F.max_pool2d({}, 2)", "F.avg_pool2d({}, 2)", "{}[:, :, ::2, ::2]",
                 f"F.adaptive_avg_pool2d({{}}, {half})")  # fmt: skip
    d.put(code.format(x.name), "image", x.shape[0], x.c, half, half)


@step("image", able=lambda d: d.x.side <= 4)
def upsampled(d: Draft) -> None:
    x, more = d.x, 2 * d.x.side
    code = d.one("F.interpolate({}, scale_factor=2)", f"F.interpolate({{}}, ({more}, {more}), mode='bilinear')")
    d.put(code.format(x.name), "image", x.shape[0], x.c, more, more)


@step("image")
def moved(d: Draft) -> None:
    """Height and width are padded and cropped, rolled or flipped; channels may be flipped or rolled."""
    d.same(d.one("F.pad({}, (1, 1, 0, 0))[:, :, :, 1:-1]", "torch.roll({}, 1, 2)", "{}.flip(1)", "{}.flip(3)",
                 "torch.roll({}, 1, 1)", "{}.contiguous()").format(d.x.name))  # fmt: skip


@step("image", able=lambda d: d.x.c <= 12)
def padded_channels(d: Draft) -> None:
    """The shortcut of the first ResNets, which pads channels with zeros."""
    left, right = d.one((0, 2), (2, 2), (1, 0))
    d.widened(f"F.pad({d.x.name}, (0, 0, 0, 0, {left}, {right}))", d.x.c + left + right)


@step("image", able=lambda d: d.x.c % 4 == 0 and d.x.side <= 8)
def pixels_shuffled(d: Draft) -> None:
    d.put(f"F.pixel_shuffle({d.x.name}, 2)", "image", d.x.shape[0], d.x.c // 4, 2 * d.x.side, 2 * d.x.side)


@step("image", able=lambda d: d.x.c <= 6 and d.x.side % 2 == 0)
def pixels_unshuffled(d: Draft) -> None:
    d.put(f"F.pixel_unshuffle({d.x.name}, 2)", "image", d.x.shape[0], 4 * d.x.c, d.x.side // 2, d.x.side // 2)


@step("image", able=even)
def shuffled(d: Draft) -> None:
    c, side, x = d.x.c, d.x.side, d.x.name
    d.same(d.one(f"{x}.view({d.n}, 2, {c // 2}, {side}, {side}).transpose(1, 2).reshape({d.n}, {c}, {side}, {side})",
                 f"{x}.unflatten(1, (2, -1)).transpose(1, 2).flatten(1, 2)", f"F.channel_shuffle({x}, 2)"))  # fmt: skip


@step("image")
def gate(d: Draft) -> None:
    """Squeeze and excitation."""
    x, inner = d.x, d.width()
    mean = d.one(f"F.adaptive_avg_pool2d({x.name}, 1)", f"{x.name}.mean((2, 3), keepdim=True)")
    down, up = d.part(f"nn.Conv2d({x.c}, {inner}, 1)"), d.part(f"nn.Conv2d({inner}, {x.c}, 1)")
    d.same(f"{x.name} * torch.sigmoid({up}(F.relu({down}({mean}))))")


@step("image")
def spatial_gate(d: Draft) -> None:
    """One map of weights for all channels, computed from their mean or by a convolution."""
    made = d.part(f"nn.Conv2d({d.x.c}, 1, 1)")
    d.same(f"{d.x.name} * torch.sigmoid({d.one(f'{made}({d.x.name})', f'{d.x.name}.mean(1, keepdim=True)')})")


@step("image", able=lambda d: d.x.side <= 8)
def to_tokens(d: Draft) -> None:
    x = d.x
    code = d.one("{}.flatten(2).transpose(1, 2)", f"{{}}.view({d.n}, {x.c}, -1).permute(0, 2, 1)",
                 "{}.permute(0, 2, 3, 1).flatten(1, 2)")  # fmt: skip
    d.put(code.format(x.name), "tokens", x.shape[0], x.side**2, x.c)


@step("image", able=lambda d: d.x.c * d.x.side**2 <= 200)
def to_flat(d: Draft) -> None:
    x, all_of, d.copied = d.x, d.x.c * d.x.side**2, True
    code = d.one("{}.flatten(1)", f"{{}}.reshape({d.n}, {all_of})", "{}.permute(0, 2, 3, 1).flatten(1)",
                 f"{{}}.view({d.n}, -1)" if x.side > 1 else "{}.flatten(1)")  # fmt: skip
    d.put(code.format(f"{x.name}.contiguous()" if "view" in code else x.name), "flat", x.shape[0], all_of)


@step("image")
def image_pooled(d: Draft) -> None:
    code = d.one("{}.mean((2, 3))", "{}.amax((-2, -1))", "{}.mean([2, 3])")
    d.put(code.format(d.x.name), "flat", d.x.shape[0], d.x.c)


@step("tokens")
def tokens_pooled(d: Draft) -> None:
    code = d.one("{}.mean(1)", "{}[:, 0]", "{}.amax(dim=1)", "{}.sum(axis=1)")
    d.put(code.format(d.x.name), "flat", d.x.shape[0], d.x.c)


@step("tokens")
def attention(d: Draft) -> None:
    """Hand-written attention: packed or separate projections, any number of heads, two spellings of the product."""
    x, heads, size = d.x, d.one(1, 2), d.one(2, 3)
    n, t, width = x.shape[0], x.shape[1], heads * size
    at = len(d.lines)
    q, k, v = (f"{name}{at}" for name in "qkv")
    if d.one(True, False):
        packed, cut = d.part(f"nn.Linear({x.c}, {3 * width})"), f"view({d.n}, {t}, {heads}, {size}).transpose(1, 2)"
        code = d.one(f"{packed}({x.name}).view({d.n}, {t}, 3, {heads}, {size}).permute(2, 0, 3, 1, 4).unbind(0)",
                     f"{packed}({x.name}).reshape({d.n}, {t}, 3, {heads}, -1).permute(2, 0, 3, 1, 4)",
                     f"(s.{cut} for s in {packed}({x.name}).chunk(3, -1))")  # fmt: skip
    else:
        maps = [d.part(f"nn.Linear({x.c}, {width}, bias={d.one(True, False)})") for _ in "qkv"]
        code = ", ".join(f"{m}({x.name}).view({d.n}, -1, {heads}, {size}).transpose(1, 2)" for m in maps)
    d.lines.append(f"{q}, {k}, {v} = {code}")
    product = d.one(f"F.scaled_dot_product_attention({q}, {k}, {v})",
                    f"(({q} @ {k}.transpose(-2, -1)) * {size**-0.5:.4f}).softmax(-1) @ {v}",
                    f"torch.einsum('bhts,bhsd->bhtd', ({q} @ {k}.transpose(-2, -1) / 2).softmax(-1), {v})")  # fmt: skip
    join = d.one(f".transpose(1, 2).reshape({d.n}, {t}, {width})", ".transpose(1, 2).flatten(2)")
    out = d.part(f"nn.Linear({width}, {x.c})")
    d.put(f"{d.one(f'{x.name} + ', '')}{out}(({product}){join})", "tokens", n, t, x.c)


@step("tokens", able=lambda d: d.x.shape[1] <= 64)
def built_in_attention(d: Draft) -> None:
    made = d.part(f"nn.MultiheadAttention({d.x.c}, {d.one(1, 2) if d.x.c % 2 == 0 else 1}, batch_first=True)")
    d.same(f"{d.one(d.x.name + ' + ', '')}{made}({d.x.name}, {d.x.name}, {d.x.name}, need_weights=False)[0]")


@step("image", able=lambda d: d.x.side % 2 == 0)
def windows(d: Draft) -> None:
    """Swin's partition into windows, and its inverse after a layer."""
    n, c, side, x = d.x.shape[0], d.x.c, d.x.side, d.x.name
    cut = f"{x}.permute(0, 2, 3, 1).reshape({d.n}, {side // 2}, 2, {side // 2}, 2, {c}).permute(0, 1, 3, 2, 4, 5)"
    y = d.put(f"{d.part(f'nn.Linear({c}, {c})')}({cut}.reshape(-1, 4, {c}))", "windows", n * side * side // 4, 4, c)
    d.live.remove(y)
    d.put(f"{y.name}.view({d.n}, {side // 2}, {side // 2}, 2, 2, {c}).permute(0, 5, 1, 3, 2, 4)"
          f".reshape({d.n}, {c}, {side}, {side})", "image", n, c, side, side)  # fmt: skip


@step("image", able=lambda d: d.x.side % 2 == 0 and d.x.c <= 6)
def patches(d: Draft) -> None:
    """Unfolded, mapped by a layer, and folded again."""
    width, c, half, d.copied = d.width(), d.x.c, d.x.side // 2, True
    made = d.part(f"nn.Conv1d({4 * c}, {4 * width}, 1)")
    code = f"{made}(F.unfold({d.x.name}, 2, stride=2))"
    if d.one(True, False):
        d.widened(f"F.fold({code}, ({d.x.side}, {d.x.side}), 2, stride=2)", width)
    else:
        d.put(f"{code}.transpose(1, 2)", "tokens", d.x.shape[0], half * half, 4 * width)


@step("tokens")
def token_mixing(d: Draft) -> None:
    """A linear map over positions, as in an MLP-Mixer."""
    made = d.part(f"nn.Linear({d.x.shape[1]}, {d.x.shape[1]})")
    d.same(f"{made}({d.x.name}.transpose(1, 2)).transpose(1, 2)")


@step("tokens", able=lambda d: d.x.shape[1] <= 64)
def class_token(d: Draft) -> None:
    n, t, c = d.x.shape
    position = d.raw(1, t + 1, c)
    d.put(f"torch.cat([{d.raw(1, 1, c)}.expand({d.n}, -1, -1), {d.x.name}], 1) + {position}", "tokens", n, t + 1, c)


@step("tokens", able=lambda d: int(d.x.shape[1] ** 0.5) ** 2 == d.x.shape[1])
def to_image(d: Draft) -> None:
    n, t, c = d.x.shape
    side = int(t**0.5)
    d.put(f"{d.x.name}.transpose(1, 2).reshape({d.n}, {c}, {side}, {side})", "image", n, c, side, side)


@step("tokens")
def softmax(d: Draft) -> None:
    d.same(f"{d.x.name}.softmax({d.one(1, -1)})")


@step("flat")
def product_with_a_parameter(d: Draft) -> None:
    out = d.width()
    d.widened(f"{d.x.name} @ {d.part(f'nn.Parameter(torch.zeros({d.x.c}, {out}))', 'w')}", out)


@step("flat", able=lambda d: d.x.c >= 4)
def stacked(d: Draft) -> None:
    """The outputs of two layers are stacked, then reduced or flattened."""
    one, other, width = d.layer(d.x, w := d.width()), d.layer(d.x, w), w
    how = "torch.stack([{}, {}], " + d.one("1).mean(1)", "1).flatten(1)", "2).flatten(1)")
    d.widened(how.format(one, other), width if "mean" in how else 2 * width)


