"""Merging while training: channels are masked softly, may grow back, and leave for good at the end."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from fxmerge.api import apply, settled
from fxmerge.errors import FxMergeError
from fxmerge.ir.groups import Group
from fxmerge.options import Options
from fxmerge.pipeline import prepared
from fxmerge.plan import GroupPlan, Plan
from fxmerge.planning.draft import Choice
from fxmerge.progress import silent
from fxmerge.result import Result
from fxmerge.training.optimizer_state import follow
from fxmerge.verify.silencing import set_to_zero
from fxmerge.weights.by_path import at
from fxmerge.weights.shards import is_divided

FINAL = 0.8  # of the steps, after which the choice is final


class Shrinker:
    """Narrows a model while it is trained.

        shrinker = fxmerge.Shrinker(model, example_inputs, budget={"flops": 0.5}, steps=2000)
        for images, labels in loader:
            ...
            optimizer.step()
            shrinker.step()
        small = shrinker.finish(optimizer).model     # the optimizer now holds small's parameters, and its state

    Every `every` steps, the channels of each group are ranked anew by the weights of that moment, and a growing share
    of them is *masked*: in each step, what writes them is multiplied by 1 - decay, so that they fade, while gradients
    may bring them back. With each new ranking, some masked channels grow back: they get the weights that they had when
    they were masked, and are ranked with the others next time (as in CHEX, Hou et al., CVPR 2022, and REPrune, Park et
    al., AAAI 2024). In the last fifth of the steps the choice is final. `finish` removes the masked channels.

    model:          the user's model, which is trained; its weights are masked in place. Under DistributedDataParallel,
                    give the module inside, in every process: all processes choose alike.
    example_inputs: as for `fxmerge.merge`
    steps:          calls of `step` over which the model shrinks
    every:          steps between two rankings; 0: a twentieth of `steps`
    decay:          share that masked weights lose in a step
    regrow:         share of the masked channels that grow back at the first ranking; it falls to zero over the steps
    options:        `fxmerge.Options` or its fields: budget or ratio, selection, scope, ... Without `selection`, l2
    Raises FxMergeError as `fxmerge.merge` does, and where no group can be masked.
    """

    def __init__(
        self,
        model: nn.Module,
        example_inputs: Any,
        options: Options | None = None,
        *,
        steps: int,
        every: int = 0,
        decay: float = 0.1,
        regrow: float = 0.2,
        **changes: Any,
    ) -> None:
        for name, value in (("steps", steps), ("every", every)):
            if not isinstance(value, int) or value < (name == "steps"):
                raise FxMergeError(f"{name} is {value!r}; give an integer of at least {int(name == 'steps')}")
        for name, share in (("decay", decay), ("regrow", regrow)):
            if not 0 <= share <= 1:
                raise FxMergeError(f"{name} is {share!r}; it is a share, 0 to 1")
        if changes.get("depth") or (options is not None and options.depth):
            raise FxMergeError("depth is True, but a Shrinker only narrows layers; fxmerge.merge can drop branches")
        if changes.get("own_class") or (options is not None and options.own_class):
            raise FxMergeError(
                "own_class is True, but a Shrinker chooses channels while the model is trained; give keep= for the "
                "groups that a merge with own_class=True leaves whole"
            )
        if changes.get("experts", 1) != 1 or (options is not None and options.experts != 1):
            raise FxMergeError("experts is below 1, but a Shrinker only narrows layers; fxmerge.merge can drop experts")
        split = next((name for name, value in model.named_parameters() if is_divided(value)), "")
        if split:
            raise FxMergeError(
                f"{split} is divided among processes. A Shrinker writes the weights of the model in place, as a whole; "
                "shrink the model before fully_shard, or merge it after training"
            )
        self.options = settled(options, {"selection": "l2", "refit": "none", **changes})
        self.model, self.example_inputs = model, example_inputs
        self.steps, self.every, self.decay, self.regrow = steps, every or max(1, steps // 20), decay, regrow
        self.taken, self.settled = 0, False
        self.kept: dict[str, list[int]] = {}  # group -> the channels that are not masked
        self.masks: dict[str, Tensor] = {}  # parameter -> 0 at what is masked, else 1
        self.held: dict[str, Tensor] = {}  # parameter -> its values when they were masked
        self._choose(1.0)  # says now what would fail later
        if not self.masks:
            raise FxMergeError(
                "no group of this model can be masked while it trains; call fxmerge.merge after training"
            )
        self.kept, self.masks = {}, {}

    def step(self) -> None:
        """Counts a step of training, ranks the channels anew where it is time, and lets masked ones fade."""
        if self.taken % self.every == 0 and not self.settled:
            part = min(1.0, (self.taken + self.every) / (FINAL * self.steps))
            self._choose(1 - (1 - part) ** 3)
            self.settled = part == 1
        self.taken += 1
        with torch.no_grad():
            for path, mask in self.masks.items():
                value = at(self.model, path)
                value.mul_(1 - self.decay * (1 - mask.to(value)))

    def finish(self, optimizer: Optimizer | None = None, calibration: Any = None) -> Result:
        """The merge without the masked channels. An optimizer given here holds the parameters of `Result.model` after.

        calibration: batches for refit; without them, nothing is re-solved
        """
        if not self.settled:  # fewer steps than were announced
            self._choose(1.0)
        groups = tuple(GroupPlan(name, count, tuple(self.kept[name])) for name, count in self.widths.items())
        options = self.options.replace(refit="none" if calibration is None else "calibration")
        result = apply(Plan(options, groups), self.model, self.example_inputs, calibration)
        if optimizer is not None:
            if result.model is None:
                raise FxMergeError(f"the merged model does not fit into its class: {result.report.later[-1]}")
            follow(optimizer, self.model, result)
        return result

    def state_dict(self) -> dict[str, Any]:
        """What `load_state_dict` needs to go on after an interruption, beside the model's and the optimizer's state."""
        names = ("taken", "settled", "kept", "masks", "held", "widths")
        return {name: getattr(self, name) for name in names}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Goes on where the shrinker of another process stopped."""
        self.taken, self.settled = state["taken"], state["settled"]
        self.kept, self.widths = dict(state["kept"]), dict(state["widths"])
        self.masks, self.held = dict(state["masks"]), dict(state["held"])

    def _choose(self, share: float) -> None:
        """Ranks the channels, and masks `share` of what the options ask for."""
        choice = self._choice(share)
        self.widths = {g.name: g.channels for g, _ in choice.chosen}
        masks: dict[str, Tensor] = {}
        generator = torch.Generator().manual_seed(self.options.seed + self.taken)
        back = self.regrow * 0.5 * (1 + math.cos(math.pi * min(1.0, self.taken / (FINAL * self.steps))))
        self.kept = {}
        for group, index in choice.chosen:
            params = {p for m in (*group.producers, *group.per_channel_params) for p in m.layer.params.values()}
            if not all(self._is_own(p) for p in params):
                continue
            kept = index.tolist()
            dropped = sorted({*range(group.channels)} - {*kept})
            self.kept[group.name] = kept
            growing = torch.rand(len(dropped), generator=generator) < (back if share < 1 else 0.0)
            grown = [c for c, grows in zip(dropped, growing.tolist(), strict=True) if grows]
            for path, mask in _masks(group, torch.tensor(sorted({*kept, *grown})), self.model).items():
                masks[path] = masks[path] * mask if path in masks else mask
        self.widths = {name: self.widths[name] for name in self.kept}
        self._put(masks)

    def _put(self, masks: dict[str, Tensor]) -> None:
        """Takes new masks: what is masked now is remembered, and what is masked no more gets back what it was."""
        with torch.no_grad():
            for path in {*masks, *self.masks}:
                value = at(self.model, path)
                one = torch.ones_like(value)
                before, after = self.masks.get(path, one), masks.get(path, one)
                held = self.held.get(path, value)
                self.held[path] = torch.where((before == 1) & (after == 0), value, held).detach().clone()
                value.copy_(torch.where((before == 0) & (after == 1), self.held[path], value))
        self.masks = masks

    def _choice(self, share: float) -> Choice:
        """Which channels stay at this share of the whole reduction."""
        options = self.options
        if options.budget:
            options = options.replace(budget={kind: 1 - share * (1 - left) for kind, left in options.budget.items()})
        else:
            options = options.replace(ratio=share * options.ratio)
        was = self.model.training
        try:
            ready = prepared(self.model.eval(), self.example_inputs, options, None, silent)
            return ready.choose(options)
        finally:
            self.model.train(was)

    def _is_own(self, path: str) -> bool:
        try:
            return isinstance(at(self.model, path), Tensor)
        except AttributeError:
            return False


def _masks(group: Group, kept: Tensor, model: nn.Module) -> dict[str, Tensor]:
    """{parameter: 0 at what writes the channels that are not kept, else 1}."""
    found: dict[str, Tensor] = {}

    def ones(path: str) -> Tensor:
        return found.setdefault(path, torch.ones_like(at(model, path)))

    set_to_zero(ones, replace(group, consumers=()), kept)
    return {path: mask for path, mask in found.items() if not bool(mask.all())}
