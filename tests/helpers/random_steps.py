"""The steps that random nets consist of: each writes one or more lines of source, for some kinds of activations."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

WIDTHS = (4, 6, 8, 12)
ACTS = (
    "F.relu({})", "torch.relu({})", "F.gelu({})", "F.leaky_relu({}, 0.2)", "F.silu({})", "torch.sigmoid({})",
    "{}.tanh()", "F.relu6({})", "F.hardswish({})", "F.elu({})", "{}.abs()", "F.softplus({})",
    "torch.clamp({}, -0.5, 0.7)",
    "-{}", "{} * 0.5", "{} + 0.3", "1 - {}", "{}.square()", "F.dropout({}, 0.3, self.training)",
)  # fmt: skip


@dataclass(frozen=True)
class Act:
    """An activation: image (n, c, h, w), tokens (n, t, c) or flat (n, c)."""

    name: str
    kind: str
    shape: tuple[int, ...]

    @property
    def c(self) -> int:
        return self.shape[1] if self.kind == "image" else self.shape[-1]

    @property
    def side(self) -> int:
        return self.shape[-1] if self.kind == "image" else 0


@dataclass
class Draft:
    """A net whose source is being written."""

    choose: Callable[[Sequence[Any]], Any]  # takes one of several choices at random
    x: Act  # the activation that the next step takes
    parts: list[str] = field(default_factory=list)
    lines: list[str] = field(default_factory=list)
    live: list[Act] = field(default_factory=list)
    copied: bool = False  # whether a channel may be in several places, so that a slice could take only some of them
    batch: str = ""  # how the number of samples is written, once it is
    inputs: list[tuple[str, tuple[int, ...]]] = field(default_factory=list)  # arguments of forward besides x
    shared: list[tuple[str, str, int]] = field(default_factory=list)  # layers to call again: (name, kind, width)

    @property
    def n(self) -> str:
        """The number of samples, as code: the same way in all of a net."""
        if not self.batch:
            self.batch = self.one("x.shape[0]", "x.size(0)", str(self.x.shape[0]))
        return self.batch

    def one(self, *choices: Any) -> Any:
        return self.choose(choices)

    def width(self) -> int:
        return int(self.one(*WIDTHS))

    def part(self, made: str, kind: str = "p") -> str:
        name = f"{kind}{len(self.parts)}"
        self.parts.append(f"self.{name} = {made}")
        return f"self.{name}"

    def raw(self, *shape: int, kind: str = "raw") -> str:
        return self.part(f"nn.Parameter(torch.zeros({', '.join(map(str, shape))}))", kind)

    def put(self, code: str, kind: str, *shape: int) -> Act:
        self.x = Act(f"x{len(self.lines)}", kind, shape)
        self.lines.append(f"{self.x.name} = {code}")
        self.live.append(self.x)
        return self.x

    def input(self, *shape: int) -> str:
        """Another argument of forward, of that shape."""
        name = f"y{len(self.inputs)}"
        self.inputs.append((name, shape))
        return name

    def same(self, code: str) -> Act:
        return self.put(code, self.x.kind, *self.x.shape)

    def layer(self, x: Act, out: int) -> str:
        """A plain layer from x to `out` channels, as code for its output; height and width stay."""
        if x.kind == "image":
            return f"{self.part(f'nn.Conv2d({x.c}, {out}, 3, padding=1)')}({x.name})"
        return f"{self.part(f'nn.Linear({x.c}, {out})')}({x.name})"

    def first_layer(self) -> None:
        x = self.x
        self.widened(self.layer(x, width := self.width()), width)

    def widened(self, code: str, width: int) -> Act:
        shape = list(self.x.shape)
        shape[1 if self.x.kind == "image" else -1] = width
        return self.put(code, self.x.kind, *shape)

    def act(self, name: str) -> str:
        return str(self.one(*ACTS)).format(name)

    def others(self) -> list[Act]:
        """The other activations of the same kind and shape."""
        return [a for a in self.live if a.kind == self.x.kind and a.shape == self.x.shape and a != self.x]

    def finish(self) -> None:
        outs = [self.layer(self.x, 3)]
        extra = self.one("none", "other", "itself", "pooled")
        if extra == "other":
            outs.append(self.layer(self.one(*self.live), 2))
        elif extra == "itself":
            outs.append(self.one(*self.live).name)
        elif extra == "pooled":
            outs.append(f"{self.x.name}.mean(-1)")
        self.lines.append(f"return {', '.join(outs)}" if len(outs) > 1 else f"return {outs[0]}")


@dataclass(frozen=True)
class Step:
    """One thing that a net can do with its current activation."""

    name: str
    kinds: tuple[str, ...]
    write: Callable[[Draft], Any]
    able: Callable[[Draft], bool] = lambda d: True

    def fits(self, draft: Draft) -> bool:
        return draft.x.kind in self.kinds and self.able(draft)

    def __repr__(self) -> str:
        return self.name


STEPS: list[Step] = []
ANY = ("image", "tokens", "flat")


def step(*kinds: str, able: Callable[[Draft], bool] = lambda d: True) -> Callable[[Any], Any]:
    def register(write: Callable[[Draft], Any]) -> Callable[[Draft], Any]:
        STEPS.append(Step(write.__name__, kinds or ANY, write, able))
        return write

    return register


def even(d: Draft) -> bool:
    return d.x.c % 2 == 0


@step()
def activation(d: Draft) -> None:
    d.same(d.act(d.x.name))


@step()
def in_place(d: Draft) -> None:
    """An in-place update of an activation that other code may read as well; its result may or may not be used."""
    x, others = d.x.name, [a.name for a in d.others()]
    code = d.one(f"F.relu_({x})", f"{x}.mul_(0.5)", f"F.relu({x}, inplace=True)", *(f"{x}.add_({o})" for o in others))
    if d.one(True, False):
        d.same(code)
    else:
        d.lines.append(code)


@step()
def plain_layer(d: Draft) -> None:
    width = d.width()
    d.widened(d.layer(d.x, width), width)


@step()
def layer_and_activation(d: Draft) -> None:
    width = d.width()
    d.widened(d.act(d.layer(d.x, width)), width)


@step()
def residual(d: Draft) -> None:
    inner, x = d.width(), d.x
    first = d.widened(d.act(d.layer(x, inner)), inner)
    second = d.layer(first, x.c)
    join = d.one("{} + {}", "{} - {}", "{} * {}", "torch.maximum({}, {})", "torch.where({0} > 0, {0}, {1})")
    d.put(join.format(x.name, second), x.kind, *x.shape)


@step(able=lambda d: bool(d.others()))
def joined(d: Draft) -> None:
    other = d.one(*d.others())
    join = d.one("{} + {}", "{} - {}", "{} * {}", "torch.minimum({}, {})", "torch.addcmul({0}, {1}, {0})")
    d.same(join.format(d.x.name, other.name))


@step()
def raw_parameter(d: Draft) -> None:
    c, x = d.x.c, d.x
    full = (c, 1, 1) if x.kind == "image" else (c,)
    shape = d.one(full, (1, *full), (1,) * len(full))
    op = d.one("{} * {}", "{} + {}", "{} - {}", "{} / {}", "{1} * {0}", "{0} * (1 + {1})")
    d.same(op.format(x.name, d.raw(*shape, kind="scale")))


@step()
def viewed_parameter(d: Draft) -> None:
    view = d.one(".view(-1, 1, 1)", "[:, None, None]", f".view(1, {d.x.c}, 1, 1)") if d.x.kind == "image" else ""
    d.same(f"{d.x.name} * {d.raw(d.x.c)}{view}")


@step()
def again(d: Draft) -> None:
    """A layer that is called twice."""
    known = [name for name, kind, width in d.shared if (kind, width) == (d.x.kind, d.x.c)]
    if not known or d.one(True, False):
        layer = f"nn.Conv2d({d.x.c}, {d.x.c}, 1)" if d.x.kind == "image" else f"nn.Linear({d.x.c}, {d.x.c})"
        known = [d.part(layer)]
        d.shared.append((known[0], d.x.kind, d.x.c))
    d.same(d.act(f"{d.one(*known)}({d.x.name})"))


@step(able=even)
def halves(d: Draft) -> None:
    """The channels are split into halves, which are gated, added, or swapped, or one of which is never read."""
    x, axis, half = d.x, 1 if d.x.kind == "image" else d.one(-1, len(d.x.shape) - 1), d.x.c // 2
    before = ":, " * (1 if axis == 1 else len(x.shape) - 1)
    cut = d.one(f"{x.name}.chunk(2, {axis})", f"torch.split({x.name}, {half}, {axis})",
                f"{x.name}[{before}:{half}], {x.name}[{before}{half}:]")  # fmt: skip
    a, b = f"a{len(d.lines)}", f"b{len(d.lines)}"
    d.lines.append(f"{a}, {b} = {cut}")
    if d.one(False, True):
        d.lines.pop()
        d.widened(f"F.glu({x.name}, {axis})", half)
        return
    how = d.one(f"{a} * torch.sigmoid({b})", f"{a} + {b}", f"F.silu({a}) * {b}", a, f"torch.cat([{b}, {a}], {axis})")
    d.widened(how, x.c if how.startswith("torch.cat") else half)


@step(able=lambda d: d.x.c > 4)
def part_in_place(d: Draft) -> None:
    """Some channels are updated in place, through a view."""
    index = ":, :, :4" if d.x.kind == "tokens" else ":, :4"
    copy = d.same(f"{d.x.name}.clone()")
    d.lines.append(f"{copy.name}[{index}].{d.one('mul_(2.0)', 'relu_()', 'sigmoid_()')}")


@step(able=lambda d: d.x.c <= 12)
def repeated(d: Draft) -> None:
    axis = 1 if d.x.kind == "image" else len(d.x.shape) - 1
    d.copied = True
    times = ", ".join("2" if a == axis else "1" for a in range(len(d.x.shape)))
    code = d.one(f"{{}}.repeat({times})", f"{{}}.repeat_interleave(2, {axis})", f"{{}}.unsqueeze({axis}).expand(")
    if "expand" in code:
        sizes = [*d.x.shape[:axis], 2, *d.x.shape[axis:]]
        code += f"{', '.join(map(str, sizes))}).flatten({axis}, {axis + 1})"
    d.widened(code.format(d.x.name), 2 * d.x.c)


@step()
def measured(d: Draft) -> None:
    """Divided by a norm, or shifted by a mean, of each channel or over the channels."""
    x, last = d.x.name, len(d.x.shape) - 1
    axis = d.one(1, last)
    d.same(d.one(f"F.normalize({x}, dim={axis})", f"{x} - {x}.mean({axis}, keepdim=True)",
                 f"{x} * {x}.amax({axis}, keepdim=True)",
                 f"{x} / (1 + {x}.norm(dim={axis}, keepdim=True))"))  # fmt: skip


@step(able=lambda d: d.x.c > 4 and not d.copied)
def slices(d: Draft) -> None:
    """Some channels are selected by literal bounds; the others may never be read."""
    start, x = d.one(0, 1, 2), d.x
    stop = d.one(x.c, x.c - 1, x.c - 2)
    index = f":, {start}:{stop}" if x.kind != "tokens" else f":, :, {start}:{stop}"
    axis = 1 if x.kind != "tokens" else 2
    code = d.one(f"{x.name}[{index}]", f"{x.name}.narrow({axis}, {start}, {stop - start})")
    d.widened(code, stop - start)


@step(able=lambda d: d.x.c <= 24)
def concatenated(d: Draft) -> None:
    axis = 1 if d.x.kind == "image" else -1
    rest = slice(2, None) if axis == 1 else slice(-1)
    like = [a for a in d.live if a.kind == d.x.kind and a.shape[rest] == d.x.shape[rest]]
    other = d.one(*like)
    d.copied = True
    d.widened(f"torch.cat([{d.x.name}, {other.name}], {axis})", d.x.c + other.c)


@step(able=even)
def groups_summed(d: Draft) -> None:
    """The channels are viewed as (groups, channels), and one of these axes is reduced."""
    x, half = d.x, d.x.c // 2
    lead, rest = (d.n, x.shape[2:]) if x.kind == "image" else (", ".join([d.n, *map(str, x.shape[1:-1])]), ())
    tail = "".join(f", {s}" for s in rest)
    inner = d.one(True, False)
    sizes = f"{lead}, {half}, 2{tail}" if inner else f"{lead}, 2, {half}{tail}"
    axis = (1 if x.kind == "image" else len(x.shape) - 1) + inner
    d.widened(f"{x.name}.reshape({sizes}).{d.one('sum', 'amax', 'mean')}({axis})", half)
