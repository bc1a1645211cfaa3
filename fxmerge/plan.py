"""The plan: what was decided, as plain data that goes to JSON and comes back."""

from __future__ import annotations

import dataclasses
import io
import json
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from fxmerge.errors import FxMergeError
from fxmerge.ir.groups import Group
from fxmerge.options import Options

VERSION = 1


@dataclass(frozen=True, slots=True)
class Partner:
    """Where one dropped channel went: `into` kept channel `scale` times, or nowhere (into -1)."""

    channel: int
    into: int
    scale: float
    cosine: float


@dataclass(frozen=True)
class GroupPlan:
    """One group's decision: `kept` of its `channels`."""

    name: str
    channels: int
    kept: tuple[int, ...]
    partners: tuple[Partner, ...] = ()

    @property
    def similarity(self) -> float:
        """Mean cosine of the dropped channels to what carries them, 0 where nothing does; 1 if none was dropped."""
        return sum(p.cosine for p in self.partners) / len(self.partners) if self.partners else 1.0


@dataclass(frozen=True)
class Plan:
    """What was decided: the options, and each group's kept channels."""

    options: Options
    groups: tuple[GroupPlan, ...]

    def json(self) -> str:
        """The plan as JSON text; `Plan.from_json` reads it back equal."""
        options = fields(self.options)
        del options["ratio" if self.options.budget else "budget"]  # one of them was asked for
        return json_text({"fxmerge_plan": VERSION, **fields(self), "options": options}, sort_keys=True)

    @staticmethod
    def from_json(text: str) -> Plan:
        """Read a plan. Raises FxMergeError for text that is no plan of a version known here."""
        try:
            data = json.loads(text)
        except json.JSONDecodeError as error:
            raise FxMergeError(f"this is not a plan: it is not JSON ({error})") from error
        if not isinstance(data, dict) or data.get("fxmerge_plan") != VERSION:
            raise FxMergeError(f'this is not a plan of version {VERSION}: no "fxmerge_plan": {VERSION} at its top')
        try:
            options = Options().replace(**data["options"])
            return Plan(options, tuple(_group(g) for g in data["groups"]))
        except FxMergeError:
            raise
        except (KeyError, TypeError, ValueError, AttributeError) as error:
            raise FxMergeError(f"this plan is damaged: {error!r}") from error


def fields(record: Any) -> dict[str, Any]:
    return {f.name: getattr(record, f.name) for f in dataclasses.fields(record)}


def json_text(data: Any, sort_keys: bool = False) -> str:
    """JSON of plain data and records, of which a large plan has many: they become dicts one at a time."""
    text = io.StringIO()
    json.dump(data, text, indent=1, sort_keys=sort_keys, default=fields)
    return text.getvalue()


def _group(data: dict[str, Any]) -> GroupPlan:
    kinds: dict[str, Any] = {"channel": int, "into": int, "scale": float, "cosine": float}
    partners = tuple(Partner(**{k: kinds[k](v) for k, v in p.items()}) for p in data["partners"])
    kept = tuple(int(k) for k in data["kept"])
    if sorted(set(kept)) != list(kept) or not kept or kept[0] < 0 or kept[-1] >= data["channels"]:
        raise FxMergeError(f"this plan is damaged: the kept channels of {data['name']} are no subset of its channels")
    return GroupPlan(str(data["name"]), int(data["channels"]), kept, partners)


def planned(groups: Sequence[Group], plan: Plan) -> list[tuple[Group, Tensor]]:
    """Those of some groups that a plan narrows, with the channels that it keeps: what `survivors` takes."""
    kept = {p.name: p.kept for p in plan.groups}
    return [(g, torch.tensor(kept[g.name])) for g in groups if g.name in kept]
