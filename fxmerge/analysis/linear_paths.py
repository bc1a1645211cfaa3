"""Linear paths: groups whose channels may be mixed by any matrix, as nothing between their layers hinders it.

Let a group's channels x be rotated, x' = B x, by multiplying the rows of its producers by B and the columns of its
consumers by B^-1. The model computes the same if each op between them is linear and treats all channels alike: moving
entries, sums over positions (attention, pooling), sums of two outputs, products with a number. A function hinders it,
and so does an op that is not known to be linear (`Rule.linear`). Norms over all channels and parameters of each channel
do not, where these can be moved into the layers and B is orthogonal (`channel_factors.py`). Copies of the
channels that never meet are strands, each of which may have a matrix of its own.
"""

from __future__ import annotations

import numpy as np
from torch import fx

from fxmerge.analysis.channel_factors import ChannelFactors, HinderedError
from fxmerge.graph.nested import leaves
from fxmerge.ir.capture import Capture
from fxmerge.ir.groups import Factors, Ints, Path, Strands
from fxmerge.ir.labels import numbers
from fxmerge.ir.provenance import Provenance
from fxmerge.rules.call_names import call_name

_LAYERS = ("linear", "conv", "matrix", "embedding")  # layers whose rows or columns can be mixed
_SUMS = ("add", "sub")  # rules that are linear in all operands together, not in each


def mixable(
    captured: Capture, facts: Provenance, path: Path, atom: Ints, inside: Ints, cells: int
) -> tuple[str, Factors]:
    """Why the channels of a group cannot be mixed by orthogonal matrices, a clause, or "" where they can; its factors.

    atom: (label_count,) the atom of each label; inside: (n,) the atoms of the group; cells: how many it has
    """
    if not path.consumers:
        return "no layer reads its channels", Factors()
    carried = frozenset(m.layer.node for m in path.per_channel_params)
    why = "" if path.mixers else _nonlinear(captured, facts, path, carried)
    if why or not (carried or path.mixers):
        return why, Factors()
    try:
        passed = ChannelFactors(captured, facts, path, atom, inside).found()
    except HinderedError as hindrance:
        return str(hindrance), Factors()
    if path.mixers:
        why = _nonlinear(captured, facts, path, passed.nodes)
    if passed.factors.centred and cells > 1:
        why = why or "a norm subtracts the mean of channels that are merged in several parts"
    return why, Factors() if why else passed.factors


def _nonlinear(captured: Capture, facts: Provenance, path: Path, passed: frozenset[str]) -> str:
    mixers = [name for name in path.mixers if name not in passed]
    if mixers:
        return f"{_called(captured, mixers[0])} mixes its channels"
    if any(meeting.op not in ("add", "sub", "either") for meeting in path.meetings):
        return "its channels are multiplied by each other"
    for member in (*path.producers, *path.consumers):
        layer = member.layer
        if layer.op not in _LAYERS or layer.groups > 1 or layer.inner or layer.is_stacked:
            kind = f"{layer.op} in groups" if layer.groups > 1 else layer.op
            return f"it is written or read by a layer whose rows or columns are not mixed ({kind})"
    return _hindered(captured, facts, path, passed)


def _hindered(captured: Capture, facts: Provenance, path: Path, passed: frozenset[str]) -> str:
    """The first op on the way that is not linear, or "", but for those that are passed."""
    nodes = {node.name: node for node in captured.module.graph.nodes}
    written, read = ({m.layer.node for m in members} for members in (path.producers, path.consumers))
    for name in (n for n in facts.kinds if n in path.nodes):
        dtype = captured.dtypes.get(name)
        if dtype is not None and not dtype.is_floating_point:
            return f"{_called(captured, name)} gives values of {str(dtype).removeprefix('torch.')}"
        if name in facts.made:
            return f"{_called(captured, name)} makes values as wide as its channels"
        if name in written or name in passed or facts.kinds[name] in ("movement", "query"):
            continue
        times = sum(leaf.name in path.nodes for leaf in _operands(nodes[name]))
        if not facts.linear.get(name, False) or (times != 1 and facts.rules[name] not in _SUMS):
            return f"{_called(captured, name)} is not linear"
    for name, sources in facts.sources.items():
        reads = any(source in path.nodes for source in sources)
        if (
            reads
            and name not in path.nodes
            and name not in read
            and name not in passed
            and facts.kinds[name] != "query"
        ):
            return f"{_called(captured, name)} is not linear"
    return ""


def strands(facts: Provenance, path: Path, atom: Ints, inside: Ints) -> Strands:
    """Which copies of the channels of a linear path never meet.

    atom: (label_count,) the atom of each label; inside: (n,) the atoms of the group

    An activation has the labels of the places of the weight that wrote it, as long as each op has one operand that
    holds channels, and keeps all of their labels. So a consumer's labels say which copy it reads.
    """
    together = Strands(1, *(tuple((0,) * m.where.size(1) for m in ms) for ms in (path.producers, path.consumers)))
    if len({p.place for p in path.producers}) > 1 or path.producers[0].where.size(1) == 1:
        return together
    written = {m.layer.node for m in path.producers}
    mine = np.zeros(int(atom.max()) + 1, dtype=bool)
    mine[inside] = True

    def held(node: str) -> set[int]:
        labels = numbers(facts.labels[node]).numpy()
        return set(labels[mine[atom[labels]]].tolist())

    for name in path.nodes - written:
        if facts.kinds[name] in ("movement", "query"):
            continue
        sources = [s for s in facts.sources[name] if s in path.nodes]
        if len(sources) != 1 or held(name) != held(sources[0]):
            return together
    first = path.producers[0]
    assert first.layer.writes is not None
    copy = np.full(len(atom), -1, dtype=np.int64)  # of each label
    for number, places in enumerate(first.where.T):
        copy[first.layer.writes[places].numpy()] = number
    found = []
    for consumer in path.consumers:
        assert consumer.layer.reads is not None
        read = copy[consumer.layer.reads.flatten()[consumer.where].numpy()]  # (m, copies)
        if (read < 0).any() or (read != read[:1]).any():
            return together
        found.append(tuple(read[0].tolist()))
    by_place = dict(zip((c.place for c in path.consumers), found, strict=True))
    if any(by_place[c.place] != own for c, own in zip(path.consumers, found, strict=True)):
        return together
    count = first.where.size(1)
    return Strands(count, (tuple(range(count)),) * len(path.producers), tuple(found))


def _operands(node: fx.Node) -> list[fx.Node]:
    """The nodes that a call takes, each as often as it does."""
    return [leaf for leaf in leaves([list(node.args), dict(node.kwargs)]) if isinstance(leaf, fx.Node)]


def _called(captured: Capture, name: str) -> str:
    """What a node calls: the class of a module, or a function."""
    node = next(node for node in captured.module.graph.nodes if node.name == name)
    if node.op == "call_module":
        return type(captured.module.get_submodule(str(node.target))).__name__
    return call_name(node)
