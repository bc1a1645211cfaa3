"""Channel factors: norms and parameters of each channel on linear paths, which a rotation passes once they are moved.

A residual stream is read through norms, y = gamma x / |x| + beta, and its branches may end in a LayerScale. An
orthogonal matrix B changes no norm, nor the mean over channels if it keeps the vector of ones. So B passes once gamma
and the scales have moved into the weights next to them, and beta is B (beta / gamma) (Ashkboos et al., SliceGPT, ICLR
2024, section 3.2, which turns each LayerNorm into an RMSNorm; here it stays what it is). A BatchNorm after a layer is
an affine map of each channel, whose gain moves into the layer, too: so linear bottlenecks are rotated, as of
MobileNetV2.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace

import numpy as np
from torch import fx

from fxmerge.ir.capture import Capture
from fxmerge.ir.groups import Factors, Ints, Member, Path
from fxmerge.ir.labels import thin
from fxmerge.ir.provenance import Provenance
from fxmerge.weights.by_path import at

NORMS = ("layer_norm", "rms_norm")
_ADDED = ("offset", "joined")  # parameters that are rotated as a producer's rows are
_KEEPING = ("dropout", "identity", "mean")  # ops that leave a constant as it is, beside movement
_LARGEST = 1e3  # beta / gamma, as beyond it rounding counts


@dataclass(frozen=True)
class Passed:
    """The factors of a group, and the nodes that a rotation passes on account of them."""

    factors: Factors
    nodes: frozenset[str]


@dataclass(frozen=True)
class _State:
    """What lies between the group's coordinates and an activation: scales that are still to come on the way from its
    producer, and the nodes whose parameters it has passed on the way to consumers.

    normed, constant: as in `Factors`
    """

    ahead: tuple[str, ...] = ()
    behind: tuple[str, ...] = ()
    normed: bool = False
    constant: bool = True


class ChannelFactors:
    """Finds the factors of one group. Any `HinderedError` tells what a rotation does not pass."""

    def __init__(self, captured: Capture, facts: Provenance, path: Path, atom: Ints, inside: Ints) -> None:
        self.captured, self.facts, self.nodes = captured, facts, path.nodes
        self.producers, self.consumers = path.producers, path.consumers
        self.carried: dict[str, Member] = {}
        for member in path.per_channel_params:
            several = member.layer.node in self.carried or len(member.channels) < len(inside)
            known = member.layer.op in (*NORMS, *_ADDED, "scale", "batch_norm")
            alone = "bias" in member.layer.params and "weight" not in member.layer.params
            if several or alone or not known:
                raise HinderedError(f"its channels have parameters of their own ({member.layer.op})")
            self.carried[member.layer.node] = member
        self.atom, self.inside = atom, inside
        self.graph = {node.name: node for node in captured.module.graph.nodes}
        self.written = {m.layer.node: number for number, m in enumerate(self.producers)}
        self.squares = {self._square(name): name for name in path.mixers if self._is_mean_of_squares(name)}
        self.norms = {n for n in path.nodes if facts.rules.get(n) in NORMS and self._normalises_all(n)}
        self.divided = self._divided()

    def found(self) -> Passed:
        """The factors. Raises HinderedError."""
        whole = [m for m in (*self.producers, *self.consumers) if len(m.channels) == len(self.inside)]
        if len(whole) < len(self.producers) + len(self.consumers) or any(p.where.size(1) > 1 for p in self.producers):
            raise HinderedError(
                "a layer has only some of its channels, or some twice, beside norms or parameters of each channel"
            )
        scales = {number: self._scales_after(member) for number, member in enumerate(self.producers)}
        states: dict[str, _State] = {}
        for name in (n for n in self.facts.kinds if n in self.nodes):
            if name in self.written:
                states[name] = _State(ahead=scales[self.written[name]])
                continue
            own = [states[s] for s in self.facts.sources[name] if s in states]
            if len({(s.ahead, s.behind) for s in own}) != 1:
                raise HinderedError(f"{name} joins channels before and after parameters of their own")
            first = replace(own[0], constant=all(s.constant for s in own), normed=all(s.normed for s in own))
            states[name] = self._after(name, first)
        read = [self._read(member, states) for member in self.consumers]
        factors = Factors(
            producers=tuple(tuple(self.carried[s] for s in scales[n]) for n in range(len(self.producers))),
            consumers=tuple(tuple(self.carried[s] for s in state.behind) for state in read),
            added=tuple(m for m in self.carried.values() if m.layer.op in _ADDED),
            normed=tuple(state.normed for state in read),
            constant=tuple(state.constant for state in read),
            centred=any(self.facts.rules[n] == "layer_norm" for n in self.norms),
        )
        self._check(factors)
        return Passed(factors, frozenset([*self.norms, *self.carried, *self.squares, *self.squares.values()]))

    def _after(self, name: str, state: _State) -> _State:
        """The state of a node's output, for that of its input."""
        member = self.carried.get(name)
        if name in self.norms or name in self.squares:
            self._plain(name, state)
            return _State(behind=(name,) if member and member.layer.params else (), normed=True)
        if member is None:
            divided = name in self.divided
            keeps = divided or self.facts.kinds[name] == "movement" or self.facts.rules.get(name) in _KEEPING
            return replace(state, normed=state.normed or divided, constant=state.constant and keeps)
        if member.layer.op in _ADDED and member.layer.operation.inverted is None:
            self._plain(name, state)
            return state
        if state.ahead:
            return _State(ahead=state.ahead[1:])
        if member.layer.op != "scale" or not _moves(member):
            raise HinderedError(f"its channels have parameters of their own ({member.layer.operation})")
        return replace(state, behind=(*state.behind, name))

    def _plain(self, name: str, state: _State) -> None:
        if state.behind:
            raise HinderedError(f"{name} stands between parameters of each channel")

    def _read(self, member: Member, states: Mapping[str, _State]) -> _State:
        """The state of what a consumer reads."""
        own = {states[s] for s in self.facts.sources[member.layer.node] if s in states}
        if len(own) != 1:
            raise HinderedError("a layer reads its channels before and after parameters of their own")
        return own.pop()

    def _scales_after(self, producer: Member) -> tuple[str, ...]:
        """The scales that alone follow a producer: nothing else reads what is between."""
        found, node = [], self.graph[producer.layer.node]
        while len(users := self._reading(node)) == 1:
            (node,) = users
            sources = [s for s in self.facts.sources.get(node.name, ()) if s in self.nodes]
            member = self.carried.get(node.name)
            if node.name not in self.nodes or node.name in self.norms or len(sources) != 1:
                break
            if member is not None and not _moves(member):
                break
            found += [node.name] if member is not None else []
        return tuple(found)

    def _reading(self, node: fx.Node) -> list[fx.Node]:
        """The users of a node that read more than sizes."""
        return [u for u in node.users if self.facts.kinds.get(u.name) != "query" or u.name in self.nodes]

    def _is_mean_of_squares(self, name: str) -> bool:
        """Does a node take the mean, over the channels, of the squares of all of them?"""
        node, square = self.graph[name], self._square(name)
        if self.facts.rules.get(name) != "mean" or square not in self.nodes or name in self.nodes:
            return False
        given = self.graph[square]
        powers = self.facts.rules.get(square) == "pow" and len(given.args) > 1 and given.args[1] == 2
        twice = self.facts.rules.get(square) == "mul" and len(given.args) == 2 and given.args[0] is given.args[1]
        dims = node.args[1] if len(node.args) > 1 else node.kwargs.get("dim")
        last = [dims] if isinstance(dims, int) else dims
        rank = len(self.captured.shapes.get(square, ()))
        over = isinstance(last, (list, tuple)) and len(last) == 1 and last[0] in (-1, rank - 1)
        return (powers or twice) and over and all(u is node for u in given.users) and self._normalises_all(square)

    def _divided(self) -> set[str]:
        """The nodes that multiply channels by what is computed from the mean of their squares."""
        found: set[str] = set()
        ahead, seen = [self.graph[mean] for mean in self.squares.values()], set[str]()
        while ahead:
            node = ahead.pop()
            for user in node.users:
                if user.name in self.nodes:
                    found.add(user.name)
                elif user.name not in seen:
                    seen.add(user.name)
                    ahead.append(user)
        return found

    def _square(self, name: str) -> str:
        sources = self.facts.sources.get(name, ())
        return sources[0] if len(sources) == 1 else ""

    def _normalises_all(self, name: str) -> bool:
        """Are all channels of the group along the last axis, once, at each position?"""
        labels = thin(self.facts.labels[name])
        rows = np.sort(self.atom[labels.reshape(-1, labels.size(-1)).numpy()], 1)
        return rows.shape[1] == len(self.inside) and bool((rows == np.sort(self.inside)).all())

    def _check(self, factors: Factors) -> None:
        """Raises HinderedError for parameters that cannot be moved."""
        for members, parts in ((self.producers, factors.producers), (self.consumers, factors.consumers)):
            found: dict[tuple[str, bytes], tuple[Mapping[str, str], ...]] = {}
            for member, own in zip(members, parts, strict=True):
                moved = tuple(part.layer.params for part in own)
                if found.setdefault(member.place, moved) != moved:
                    raise HinderedError("one layer is called beside different parameters of its channels")
        # in order, as processes that divide the weights among them read each together
        for name in () if self.captured.blank else sorted(self.norms & set(self.carried)):
            params = self.carried[name].layer.params
            if "bias" in params and "weight" in params:
                gain, constant = (at(self.captured.module, params[slot]).double() for slot in ("weight", "bias"))
                if bool((constant.abs() > _LARGEST * gain.abs()).any()):
                    raise HinderedError(f"{name} has gains near zero")


def _moves(member: Member) -> bool:
    """Is it a gain of each channel that can move into the layer before it? It may add something, too."""
    norm = member.layer.op == "batch_norm" and member.layer.has_running_statistics and "bias" in member.layer.params
    scale = member.layer.op == "scale" and not member.layer.operation.inverted
    return (norm or scale) and member.where.size(1) == 1


class HinderedError(Exception):
    """A rotation does not pass; the message tells why, in a clause."""
