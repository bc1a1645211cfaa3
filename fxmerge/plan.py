"""The plan of a merge: its decisions as plain data, which can be written to JSON and read back."""

from __future__ import annotations

import dataclasses
import io
import json
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from fxmerge.errors import FxMergeError
from fxmerge.ir.groups import Group
from fxmerge.ir.mixtures import Thinned
from fxmerge.options import Options

VERSION = 1


@dataclass(frozen=True, slots=True)
class Partner:
    """The kept channel that replaces a dropped one: `channel` ~ scale * `into`. `into` is -1 if there is none."""

    channel: int
    into: int
    scale: float
    cosine: float


@dataclass(frozen=True)
class GroupPlan:
    """The decision for one group: which of its channels are kept, and the partners of the others.

    components: None, or the group was rotated: what is kept are principal components in the places of the channels
                `kept`, which hold this share of what the consumers compute. They follow from the weights and the data
    """

    name: str
    channels: int
    kept: tuple[int, ...]
    partners: tuple[Partner, ...] = ()
    components: float | None = None

    @property
    def similarity(self) -> float:
        """The mean cosine of dropped channels and their partners, 0 for those without one; 1 if none was dropped.

        For components, the cosine between what the consumers compute and what is left of it.
        """
        if self.components is not None:
            return float(math.sqrt(max(self.components, 0.0)))
        return sum(p.cosine for p in self.partners) / len(self.partners) if self.partners else 1.0


@dataclass(frozen=True)
class Plan:
    """The decisions of a merge: the options, the channels that groups keep, and what is dropped as a whole."""

    options: Options
    groups: tuple[GroupPlan, ...]
    branches: tuple[str, ...] = ()  # names of residual branches, in the order in which they were dropped
    experts: tuple[Thinned, ...] = ()  # the mixtures of experts of which some were dropped

    @property
    def is_empty(self) -> bool:
        """Whether the plan leaves the model as it is."""
        return not self.groups and not self.branches and not self.experts

    def json(self) -> str:
        """The plan as JSON text, which `Plan.from_json` reads back as an equal plan."""
        options = fields(self.options)
        del options["ratio" if self.options.budget else "budget"]  # only one of them was in use
        return json_text({"fxmerge_plan": VERSION, **fields(self), "options": options}, sort_keys=True)

    @staticmethod
    def from_json(text: str) -> Plan:
        """Reads a plan. Raises FxMergeError for text that is not a plan of a known version."""
        try:
            data = json.loads(text)
        except json.JSONDecodeError as error:
            raise FxMergeError(f"this is not a plan: it is not JSON ({error})") from error
        if not isinstance(data, dict) or data.get("fxmerge_plan") != VERSION:
            raise FxMergeError(f'this is not a plan of version {VERSION}: no "fxmerge_plan": {VERSION} at its top')
        try:
            options = Options().replace(**data["options"])
            groups, experts = (
                tuple(map(*of)) for of in ((_group, data["groups"]), (_thinned, data.get("experts", [])))
            )
            return Plan(options, groups, _branches(data.get("branches", [])), experts)
        except FxMergeError:
            raise
        except (KeyError, TypeError, ValueError, AttributeError) as error:
            raise FxMergeError(f"this plan is damaged: {error!r}") from error


def fields(record: Any) -> dict[str, Any]:
    """The fields of a dataclass as a dict, without those of its fields' own."""
    return {f.name: getattr(record, f.name) for f in dataclasses.fields(record)}


def json_text(data: Any, sort_keys: bool = False, convert: Callable[[Any], Any] = fields) -> str:
    """JSON text of plain data and dataclasses. Dataclasses are converted one at a time, as a large plan has many."""
    text = io.StringIO()
    json.dump(data, text, indent=1, sort_keys=sort_keys, default=convert)
    return text.getvalue()


def _branches(data: Any) -> tuple[str, ...]:
    if not isinstance(data, list) or not all(isinstance(name, str) for name in data):
        raise TypeError(f"branches is {data!r}; it should be a list of names")
    return tuple(data)


def _thinned(data: dict[str, Any]) -> Thinned:
    experts, kept = int(data["experts"]), tuple(int(k) for k in data["kept"])
    if sorted(set(kept)) != list(kept) or not kept or kept[0] < 0 or kept[-1] >= experts:
        raise FxMergeError(f"this plan is damaged: the experts kept of {data['name']} are not a subset of its experts")
    return Thinned(str(data["name"]), experts, kept, float(data["loss"]))


def _group(data: dict[str, Any]) -> GroupPlan:
    kinds: dict[str, Any] = {"channel": int, "into": int, "scale": float, "cosine": float}
    partners = tuple(Partner(**{k: kinds[k](v) for k, v in p.items()}) for p in data["partners"])
    kept = tuple(int(k) for k in data["kept"])
    if sorted(set(kept)) != list(kept) or not kept or kept[0] < 0 or kept[-1] >= data["channels"]:
        raise FxMergeError(
            f"this plan is damaged: the kept channels of {data['name']} are not a subset of its channels"
        )
    held = data.get("components")
    return GroupPlan(
        str(data["name"]), int(data["channels"]), kept, partners, None if held is None else float(held)
    )  # fmt: skip


def planned(groups: Sequence[Group], plan: Plan) -> list[tuple[Group, Tensor]]:
    """The groups that a plan narrows, with the channels that it keeps, as `survivors` takes them."""
    kept = {p.name: p.kept for p in plan.groups}
    return [(g, torch.tensor(kept[g.name])) for g in groups if g.name in kept]
