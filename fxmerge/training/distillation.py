"""The loss with which a merged model is trained towards its original, as a module for any training loop."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch.nn import functional as F
from torch.nn.modules.batchnorm import _BatchNorm

from fxmerge import verify
from fxmerge.calibration.epilogue import SOLVED, added
from fxmerge.errors import FxMergeError
from fxmerge.graph.eval_mode import EvaluationModule, evaluating
from fxmerge.graph.inputs import bind
from fxmerge.graph.outputs import returned
from fxmerge.ir.groups import survivors
from fxmerge.ir.labels import varying
from fxmerge.plan import planned
from fxmerge.result import Result
from fxmerge.weights.copy import deep_copy

COMPARED = 2**18  # values of a layer's outputs that are compared in one step, at least one sample


@dataclass(frozen=True)
class Tap:
    """Activations that are compared in the original and in the merged model.

    axis: of the channels; kept: (k,) which of the original's channels the merged model still has
    """

    node: str
    axis: int
    kept: Tensor


class Distillation(nn.Module):
    """A merged model, and the loss of its outputs and activations against those of the original.

        distillation = fxmerge.Distillation(result)
        loss = distillation(images)["loss"]      # in any loop: accelerate, Lightning, transformers.Trainer
        trained = distillation.result()          # a Result with the trained weights: .model, .save, .to_onnx

    Only the merged model's parameters are parameters of this module. `student` is a copy of `result.module`; `result`
    and the original are not changed. It is trained like any module, with two exceptions: BatchNorms keep their running
    statistics, and a model that torch.export captured stays in evaluation mode altogether (dropout is off).

    hidden:       weight of the activations: the mean, over the layers that read a merged group, of the squared error
                  of their outputs in the channels that both models have, relative to the variance (as FitNets, Romero
                  et al., 2015, without regressors: the channels correspond). Outputs that are added to a residual
                  stream are compared behind the add. Where a batch's outputs have more than 2^18 values, its first
                  samples stand for it.
    temperature:  None: the squared error of the outputs relative to their variance; a number T: T^2 times the
                  Kullback-Leibler divergence of their softmax over the last axis at temperature T, for models that
                  return logits (Hinton et al., 2015)
    batch_statistics: let BatchNorms normalize with each batch's own statistics in training mode, which are new to a
                  merged model; a training of many epochs with a large learning rate may want them.
    compile:      run both models through torch.compile: a step takes about half the time, after a minute at first
    Raises FxMergeError for a model that was captured in parts, which has no single graph, and for one that is divided
    among processes.
    """

    def __init__(
        self,
        result: Result,
        hidden: float = 1.0,
        temperature: float | None = None,
        batch_statistics: bool = False,
        compile: bool = False,
    ) -> None:
        super().__init__()
        captured = result.analysis.captured
        if captured.recorded is not None or not isinstance(result.module, fx.GraphModule):
            raise FxMergeError(
                f"{captured.name} was captured in parts, and has no single graph to distil; train result.module with "
                "your own code"
            )
        if captured.sharding is not None:
            raise FxMergeError(
                f"the weights of this {captured.name} are divided among processes, which fxmerge.distill does not "
                "train; train result.module towards the model that was merged, in a loop of your own"
            )
        if temperature is not None and not temperature > 0:
            raise FxMergeError(f"temperature is {temperature!r}; give a positive number, or None")
        if not hidden >= 0:
            raise FxMergeError(f"hidden is {hidden!r}; it is a weight, at least 0")
        self.hidden, self.temperature, self.batch_statistics = hidden, temperature, batch_statistics
        self.student = _trainable(result.module)
        self._merged = result
        self._teacher = [captured.whole.module]  # in a list, so that it is no submodule: not trained, not saved
        self._taps = {tap.node: tap for tap in taps(result)} if hidden else {}
        self._compiles, self._compiled = compile, list[Any]()

    def train(self, mode: bool = True) -> Distillation:
        """Puts the merged model in training mode, if it has one."""
        self.training = mode
        if not isinstance(self.student, EvaluationModule):
            self.student.train(mode)
            for module in nn.Module.modules(self.student) if not self.batch_statistics else ():
                if isinstance(module, _BatchNorm):
                    module.eval()
        return self

    def forward(self, *args: Any, **kwargs: Any) -> dict[str, Any]:
        """{"loss": ..., "output_loss": ..., "hidden_loss": ..., "outputs": the merged model's} for one batch."""
        teacher = self._teacher[0]
        values = bind(teacher, args, kwargs)
        with torch.no_grad(), evaluating(teacher):
            wanted, targets = self._run(0, teacher, values)
        outputs, found = self._run(1, self.student, values)
        pairs = list(zip(returned(wanted), returned(outputs), strict=True))
        loss = torch.stack([self._distance(y, z) for y, z in pairs]).mean()
        behind = [_behind(targets[n], found[n], tap) for n, tap in self._taps.items()]
        between = torch.stack(behind).mean() if behind else loss.new_zeros(())
        return {
            "loss": loss + self.hidden * between,
            "output_loss": loss,
            "hidden_loss": between,
            "outputs": outputs,
        }

    def _run(self, number: int, module: fx.GraphModule, values: list[Any]) -> tuple[Any, dict[str, Tensor]]:
        """A module's outputs, and the activations that are compared. number: 0 for the original"""
        if self._compiles:
            if not self._compiled:  # on first use, when the modules are on their device
                self._compiled = [torch.compile(_tapped(m, self._taps)) for m in (self._teacher[0], self.student)]
            outputs, found = self._compiled[number](*values)
            return outputs, found
        run = _Tapped(module, self._taps)
        outputs = run.run(*values, enable_io_processing=False)
        return outputs, run.values

    def _distance(self, wanted: Tensor, found: Tensor) -> Tensor:
        if self.temperature is None:
            return relative(wanted, found)
        soft, own = ((t.float() / self.temperature).log_softmax(-1) for t in (wanted, found))
        each = F.kl_div(own, soft, reduction="none", log_target=True).sum(-1)
        return self.temperature**2 * each.mean()

    def result(self) -> Result:
        """The merge with the weights that the student has now. The student may be trained further."""
        module = deep_copy(self.student, ()).eval()
        for (name, trained), before in zip(module.named_parameters(), self._merged.module.parameters(), strict=True):
            assert trained.shape == before.shape, name
            trained.requires_grad_(before.requires_grad)
        captured = self._merged.analysis.captured
        verdict = verify.compare(captured, module)
        report = replace(self._merged.report, module=module, graph=module, verdict=verdict, later=[])
        return replace(self._merged, module=module, report=report)


def taps(result: Result) -> list[Tap]:
    """Where the activations behind merged groups are compared: at the outputs of the layers that read them.

    If these are added to a residual stream, the sum is compared: refit lets a layer make up for what the stream has
    lost so far, so that its own outputs are not to be those of the original.
    """
    captured, facts, merged = result.analysis.captured, result.analysis.facts, result.module
    assert isinstance(merged, fx.GraphModule)
    narrowed = planned(result.analysis.groups, result.plan)
    alive = survivors(result.analysis.grouping, narrowed)
    norms = {layer.node for layer in facts.layers if layer.operation.is_norm}
    layers = {c.layer.node: c.layer for group, _ in narrowed for c in group.consumers if c.layer.op in SOLVED}
    nodes = {node.name: node for node in captured.module.graph.nodes}
    present = {
        node.name
        for node in merged.graph.nodes
        if captured.shapes.get(node.name) == captured.whole.shapes.get(node.name)  # else a router that lost experts
    }
    found = dict[str, Tap]()
    for name, layer in layers.items():
        for node in (added(captured.module, nodes[name], norms), nodes[name]) if layer.writes is not None else ():
            labels = facts.labels.get(node.name) if node is not None else None
            axes = varying(labels) if labels is not None else ()
            if node is not None and labels is not None and len(axes) == 1 and node.name in present:
                along = labels[tuple(slice(None) if a == axes[0] else 0 for a in range(labels.dim()))]
                found[node.name] = Tap(node.name, axes[0], alive[along].nonzero().flatten())
                break
    return list(found.values())


def relative(wanted: Tensor, found: Tensor) -> Tensor:
    """The squared error as a share of the variance of the wanted values."""
    wanted, found = wanted.float(), found.float()
    return (found - wanted).square().mean() / wanted.var(correction=0).clamp(min=1e-12)


def _behind(wanted: Tensor, found: Tensor, tap: Tap) -> Tensor:
    """The relative error of a layer's outputs, of the first samples that have COMPARED values in all."""
    if tap.axis:  # else there is no axis of samples
        first = max(1, COMPARED * len(wanted) // max(1, wanted.numel()))
        wanted, found = wanted[:first], found[:first]
    if len(tap.kept) != wanted.size(tap.axis):
        wanted = wanted.index_select(tap.axis, tap.kept.to(wanted.device))
    return relative(wanted, found)


def _trainable(module: fx.GraphModule) -> fx.GraphModule:
    """A copy whose floating-point parameters are trained."""
    copy = deep_copy(module, ())
    for p in copy.parameters():
        p.requires_grad_(p.is_floating_point())
    return copy


class _Tapped(fx.Interpreter):
    """Runs a graph and keeps the values of some nodes."""

    def __init__(self, module: fx.GraphModule, names: Mapping[str, Tap]) -> None:
        super().__init__(module)
        self.extra_traceback = False
        self.names, self.values = names, dict[str, Tensor]()

    def run_node(self, n: fx.Node) -> Any:
        value = super().run_node(n)
        if n.name in self.names:
            self.values[n.name] = value
        return value


def _tapped(module: fx.GraphModule, names: Collection[str]) -> fx.GraphModule:
    """A module with the same weights that also returns the values of some nodes, {name: value}."""
    graph, copied = fx.Graph(), dict[fx.Node, fx.Node]()
    outputs = graph.graph_copy(module.graph, copied)
    graph.output((outputs, {node.name: copied[node] for node in module.graph.nodes if node.name in names}))
    return fx.GraphModule(module, graph)
