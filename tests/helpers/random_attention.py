"""Steps of random nets: attention layouts, recurrent layers, shared branches, gates, slice assignment, more inputs."""

from __future__ import annotations

from tests.helpers.random_steps import Draft, step

# spellings of the scale of attention; the width of a head is on `axis` of the queries `q`
NUMBERS = ("/ math.sqrt({q}.size({axis}))", "* {q}.shape[{axis}] ** -0.5", "* {size} ** -0.5",
           "* (1.0 / {q}.size()[{axis}] ** 0.5)")  # fmt: skip
TENSORS = ("/ torch.full([], {q}.size({axis}) ** 0.5, dtype={q}.dtype)", "/ {q}.new_tensor({q}.size({axis})).sqrt()",
           "/ {q}.new_full((), {q}.shape[{axis}]).sqrt()", "/ torch.tensor({q}.size({axis}) ** 0.5)",
           "* torch.rsqrt(torch.as_tensor(float({q}.size({axis}))))")  # fmt: skip
OF_WEIGHTS = ("/ ({w}.weight.shape[0] / {heads}) ** 0.5", "* ({w}.weight.size(0) // {heads}) ** -0.5",
              "/ math.sqrt({w}.out_features / {heads})")  # fmt: skip


def _attention(d: Draft, scales: tuple[str, ...], layout: str, product: str) -> None:
    """Queries, keys and values of x, or keys and values of another sequence; a layout of heads; a kind of product."""
    x, heads, size = d.x, d.one(1, 2), d.one(2, 3, 4)
    n, t, c = x.shape
    width, at = heads * size, len(d.lines)
    q, k, v = (f"{name}{at}" for name in "qkv")
    maps = [d.part(f"nn.Linear({c}, {width}, bias={d.one(True, False)})") for _ in "qkv"]
    outer = layout == "outer"
    cut = f"view({d.n}, {t}, {heads}, {size})" if outer else f"view({d.n}, {t}, {size}, {heads})"
    back = ".transpose(1, 2)" if outer else ".permute(0, 2, 3, 1)"
    moved = "" if product == "einsum" else ".transpose(1, 2)" if outer else ".permute(0, 3, 1, 2)"
    d.lines.append(f"{q}, {k}, {v} = " + ", ".join(f"{m}({x.name}).{cut}{moved}" for m in maps))
    axis = 2 if product == "einsum" and not outer else 3
    scale = d.one(*scales).format(q=q, size=size, heads=heads, w=maps[0], axis=axis)
    if product == "einsum":
        head, other = ("thd", "shd") if outer else ("tdh", "sdh")
        d.lines.append(f"w{at} = (torch.einsum('b{head},b{other}->bhts', {q}, {k}) {scale}).softmax(-1)")
        mixed = f"torch.einsum('bhts,b{other}->b{head}', w{at}, {v})"
    elif product == "sdpa":
        mixed = f"F.scaled_dot_product_attention({q}, {k}, {v}){back}"
    else:
        d.lines.append(f"w{at} = ({q} @ {k}.transpose(-2, -1) {scale}).softmax(-1)")
        mixed = f"torch.matmul(w{at}, {v}){back}"
    code = f"{d.part(f'nn.Linear({width}, {c})')}({mixed}.reshape({d.n}, {t}, -1))"
    d.put(f"{d.one(f'{x.name} + ', '')}{code}", "tokens", n, t, c)


@step("tokens")
def attention_scaled(d: Draft) -> None:
    """The scale is a number, computed from a size in several ways."""
    _attention(d, NUMBERS, "outer", "matmul")


@step("tokens")
def attention_scale_tensor(d: Draft) -> None:
    """The scale is a tensor that is made from a size."""
    _attention(d, TENSORS, "outer", "matmul")


@step("tokens")
def attention_scale_of_weight(d: Draft) -> None:
    """The scale is computed from the shape of a weight."""
    _attention(d, OF_WEIGHTS, "outer", "matmul")


@step("tokens")
def attention_einsum(d: Draft) -> None:
    """Heads are an axis of einsum, in front of their channels."""
    _attention(d, NUMBERS, "outer", "einsum")


@step("tokens")
def attention_heads_inner(d: Draft) -> None:
    """Heads are the inner factor of the channels."""
    _attention(d, NUMBERS, "inner", d.one("matmul", "sdpa"))


@step("tokens")
def attention_einsum_inner(d: Draft) -> None:
    """Heads are the inner factor of the channels, in einsum."""
    _attention(d, NUMBERS, "inner", "einsum")


def _over_pixels(d: Draft, inner: bool) -> None:
    """Attention over the pixels of an image, with the channels in front, as SuperGlue has it."""
    x, heads, size, at = d.x, d.one(1, 2), d.one(2, 3, 4), len(d.lines)
    c, side = x.c, x.side
    cut = f"view({d.n}, {size}, {heads}, -1)" if inner else f"view({d.n}, {heads}, {size}, -1)"
    maps = [d.part(f"nn.Conv2d({c}, {heads * size}, 1)") for _ in "qkv"]
    q, k, v = (f"{name}{at}" for name in "qkv")
    d.lines.append(f"{q}, {k}, {v} = " + ", ".join(f"{m}({x.name}).{cut}" for m in maps))
    axes = "dh" if inner else "hd"
    d.lines.append(f"w{at} = (torch.einsum('b{axes}n,b{axes}m->bhnm', {q}, {k}) / {size**0.5:.4f}).softmax(-1)")
    mixed = f"torch.einsum('bhnm,b{axes}m->b{axes}n', w{at}, {v})"
    out = d.part(f"nn.Conv2d({heads * size}, {c}, 1)")
    code = f"{out}({mixed}.contiguous().view({d.n}, {heads * size}, {side}, {side}))"
    d.put(f"{d.one(f'{x.name} + ', '')}{code}", "image", *x.shape)


@step("image", able=lambda d: d.x.side <= 8)
def attention_over_pixels(d: Draft) -> None:
    _over_pixels(d, inner=False)


@step("image", able=lambda d: d.x.side <= 8)
def attention_over_pixels_inner(d: Draft) -> None:
    _over_pixels(d, inner=True)


@step("image", "flat")
def shared_branch(d: Draft) -> None:
    """A branch with a norm that is called twice, on two inputs of the same width, whose outputs are joined."""
    x, width = d.x, d.width()
    layer, norm = (f"nn.Conv2d({x.c}, {width}, 1)", "BatchNorm2d") if x.kind == "image" else (
        f"nn.Linear({x.c}, {width})", "BatchNorm1d")  # fmt: skip
    branch = d.part(f"nn.Sequential({layer}, nn.{norm}({width}), nn.ReLU())")
    other = d.one(*[a.name for a in d.others()], f"{x.name} * 0.5", f"F.relu({x.name})")
    axis = 1 if x.kind == "image" else -1
    how = d.one("{0} + {1}", "({0} - {1}).abs()", "{0} * {1}", f"torch.cat([{{0}}, {{1}}], {axis})")
    d.copied |= "cat" in how
    d.widened(how.format(f"{branch}({x.name})", f"{branch}({other})"), width * (2 if "cat" in how else 1))


@step("tokens", "flat")
def gated(d: Draft) -> None:
    """SwiGLU and its relatives: two layers, of which one gates the other, then a third."""
    x, width = d.x, d.width()
    one, two = d.part(f"nn.Linear({x.c}, {width})"), d.part(f"nn.Linear({x.c}, {width}, bias={d.one(True, False)})")
    act = d.one("F.silu({})", "torch.sigmoid({})", "F.gelu({})", "{}", "F.relu({})")
    inner = d.put(f"{act.format(f'{one}({x.name})')} * {two}({x.name})", x.kind, *x.shape[:-1], width)
    d.put(f"{d.one(f'{x.name} + ', '')}{d.layer(inner, x.c)}", x.kind, *x.shape)


@step("tokens")
def squeezed_tokens(d: Draft) -> None:
    """Squeeze and excitation over tokens."""
    x, inner = d.x, d.width()
    down, up = d.part(f"nn.Linear({x.c}, {inner})"), d.part(f"nn.Linear({inner}, {x.c})")
    gate = d.one("torch.sigmoid({})", "F.hardsigmoid({})", "(1 + torch.tanh({}))")
    d.same(f"{x.name} * {gate.format(f'{up}(F.relu({down}({x.name}.mean(1, keepdim=True))))')}")


@step(able=lambda d: d.x.c > 4)
def slice_assignment(d: Draft) -> None:
    """Some channels, or some places of all channels, are assigned."""
    x, copied = d.x, d.same(f"{d.x.name}.clone()")
    channels = ":, :, :4" if x.kind == "tokens" else ":, :4"
    places = {"image": ":, :, 0", "tokens": ":, 1:", "flat": "1:"}[x.kind]
    index = d.one(channels, places)
    value = d.one("0.0", f"{x.name}[{index}] * 2", f"F.relu({x.name}[{index}])")
    d.lines.append(f"{copied.name}[{index}] = {value}")


@step()
def second_input(d: Draft) -> None:
    """A second input of another size: a vector that shifts or scales channels, or a map that is added."""
    x = d.x
    size = d.one(3, 5)
    y = d.input(x.shape[0], size)
    made = d.part(f"nn.Linear({size}, {x.c})")
    spread = {"image": "[:, :, None, None]", "tokens": "[:, None]", "flat": ""}[x.kind]
    d.same(d.one("{0} + {1}", "{0} * (1 + {1})", "{0} * torch.sigmoid({1})").format(x.name, f"{made}({y}){spread}"))


@step("tokens")
def cross_attention(d: Draft) -> None:
    """Keys and values of a second sequence, of another length and width."""
    x, length, into, heads, size = d.x, d.one(3, 7), d.one(4, 5), d.one(1, 2), d.one(2, 3)
    n, t, c = x.shape
    width, y = heads * size, d.input(n, length, into)
    q, k, v = (d.part(f"nn.Linear({width_in}, {width})") for width_in in (c, into, into))
    cut = f"unflatten(-1, ({heads}, {size})).transpose(1, 2)"
    mixed = f"F.scaled_dot_product_attention({q}({x.name}).{cut}, {k}({y}).{cut}, {v}({y}).{cut})"
    d.put(f"{x.name} + {d.part(f'nn.Linear({width}, {c})')}({mixed}.transpose(1, 2).flatten(2))", "tokens", n, t, c)


@step("tokens", able=lambda d: d.x.shape[1] <= 64)
def recurrent(d: Draft) -> None:
    """LSTM, GRU or RNN: stacked, in both directions, with projections; all of its steps, or its last state."""
    x, size, layers, both = d.x, d.one(3, 4, 6), d.one(1, 1, 2), d.one(True, False)
    kind = d.one("LSTM", "GRU", "RNN")
    projected = kind == "LSTM" and d.one(True, False, False)
    more = ", proj_size=2" if projected else ""
    made = d.part(f"nn.{kind}({x.c}, {size}, {layers}, batch_first=True, bidirectional={both}{more})")
    width = (2 if projected else size) * (1 + both)
    if d.one(True, True, False):
        d.put(f"{made}({x.name})[0]", "tokens", *x.shape[:-1], width)
    else:
        last = f"{made}({x.name})[1]" + "[0]" * (kind == "LSTM")
        how = f"{last}[-1]" if not both else f"torch.cat([{last}[-2], {last}[-1]], -1)"
        d.put(how, "flat", x.shape[0], width)
