"""Evaluation mode: context managers for it and for reproducible runs, and graph modules that have no other mode."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager, nullcontext, redirect_stderr
from functools import wraps
from io import StringIO
from typing import Any, TypeVar

import torch
from torch import Tensor, fx, nn

NO_TRAINING = (
    "this model was captured by torch.export in evaluation mode: its BatchNorms use their running statistics and its "
    "dropout is gone, so it cannot be put in training mode; to train it, load the saved weights into your own class: "
    "fxmerge.load(folder, model=MyNet())"
)
READS_FLAG = (
    "the forward of this model reads self.training (for F.dropout, say), and its graph is that of evaluation mode, so "
    "it cannot be put in training mode; to train it, load the saved weights into your own class: "
    "fxmerge.load(folder, model=MyNet())"
)
S = TypeVar("S", bound="EvaluationModule")


class EvaluationModule(fx.GraphModule):
    """A graph module whose graph is that of evaluation mode, whatever its training flags are."""

    no_training = NO_TRAINING  # what `train` raises

    def train(self: S, mode: bool = True) -> S:
        """Raises RuntimeError for training mode, which would change nothing."""
        if mode:
            raise RuntimeError(self.no_training)
        return super().train(mode)


class FlagModule(EvaluationModule):
    """An `EvaluationModule` that torch.fx traced from a forward that reads its training flag."""

    no_training = READS_FLAG


def only_evaluating(module: fx.GraphModule, kind: type[EvaluationModule] = EvaluationModule) -> None:
    """Makes a graph module an `EvaluationModule`, in place, and clears its training flags."""
    for inner in module.modules():
        inner.training = False
    if not isinstance(module, EvaluationModule):
        own = type("GraphModuleImpl", (kind,), {})  # torch.fx knows its classes of one instance by that name
        own.__name__ = type(module).__name__
        module.__class__ = own
        module.recompile()


@contextmanager
def quiet() -> Iterator[None]:
    """For runs that may fail: a graph module that raises prints its code to the standard error stream."""
    with redirect_stderr(StringIO()):
        yield


@contextmanager
def reproducible() -> Iterator[None]:
    """Seeds the random number generators and disables torch's attention fast path; restores both on exit.

    In evaluation mode, the fast path returns zeros where padding is masked. No graph of attention's ops does that.
    """
    gpus = range(torch.cuda.device_count()) if torch.cuda.is_initialized() else ()  # type: ignore[no-untyped-call]
    fast = torch.backends.mha.get_fastpath_enabled()
    torch.backends.mha.set_fastpath_enabled(False)
    try:
        with torch.random.fork_rng(devices=gpus):
            reseed()
            yield
    finally:
        torch.backends.mha.set_fastpath_enabled(fast)


def reseed() -> None:
    """Seeds the CPU generator, and CUDA's where CUDA is initialized.

    `torch.manual_seed` would also initialize, or queue a seed for, devices that are not in use.
    """
    torch.default_generator.manual_seed(_SEED)
    if torch.cuda.is_initialized():  # type: ignore[no-untyped-call]
        torch.cuda.manual_seed_all(_SEED)


_SEED = 1750260509  # one that no forward sets itself: then a graph without that call would seem right


State = list[tuple[nn.Module, dict[str, Any]]]


def state_of(module: nn.Module) -> State:
    """The plain attributes of a module and its submodules, among them what forward keeps for later."""
    return [(m, {name: v for name, v in vars(m).items() if _is_state(m, v)}) for m in module.modules()]


def _is_state(module: nn.Module, value: Any) -> bool:
    """Of a graph, which keeps its code in attributes too, only what holds a tensor or None."""
    return value is None or isinstance(value, Tensor) or not isinstance(module, fx.GraphModule)


def moved(before: State) -> bool:
    """Whether attributes hold other tensors than before, or new ones."""
    return any(
        isinstance(value, Tensor) and held.get(name) is not value
        for module, held in before
        for name, value in vars(module).items()
    )


def put_back(before: State) -> None:
    """Gives attributes what they held before; new ones are deleted.

    All of them: a tensor may be kept together with the shape that it was made for.
    """
    for module, held in before:
        now = vars(module)
        for name in [name for name, value in now.items() if name not in held and _is_state(module, value)]:
            del now[name]
        now.update({name: value for name, value in held.items() if now.get(name, now) is not value})


@contextmanager
def forgetting(module: nn.Module, state: State) -> Iterator[None]:
    """Starts from a state, and keeps nothing that forward assigns to attributes, while the module is exported.

    What it has kept for the sizes of the example, such as the anchors of a detector, is then computed in the graph.
    torch.export refuses a forward that leaves other tensors in attributes than it found.
    """
    now = state_of(module)

    @wraps(module.forward)
    def forward(*args: Any, **kwargs: Any) -> Any:
        before = state_of(module)
        try:
            return type(module).forward(module, *args, **kwargs)
        finally:
            put_back(before)

    put_back(state)
    module.forward = forward
    try:
        yield
    finally:
        put_back(now)


def random_states() -> list[Tensor]:
    """The states of the CPU generator and, where CUDA is initialized, of CUDA's."""
    found = [torch.default_generator.get_state()]
    if torch.cuda.is_initialized():  # type: ignore[no-untyped-call]
        found += torch.cuda.get_rng_state_all()
    return found


@contextmanager
def evaluating(*modules: nn.Module) -> Iterator[None]:
    """Puts modules in evaluation mode; restores the training flag and the state of each submodule on exit.

    The flags are set one by one, since `.eval()` raises on a graph module made by torch.export.
    """
    modes = {part: part.training for module in modules for part in module.modules() if part.training}
    states = [state_of(module) for module in modules]
    for part in modes:
        part.training = False
    try:
        yield
    finally:
        for state in states:
            put_back(state)
        for part, training in modes.items():
            part.training = training


@contextmanager
def with_versions() -> Iterator[None]:
    """Leaves torch.inference_mode, in which tensors have no version counters and no gradients can be computed."""
    with torch.inference_mode(False) if torch.is_inference_mode_enabled() else nullcontext():
        yield
