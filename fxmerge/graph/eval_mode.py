"""Evaluation mode: context managers for it and for reproducible runs, and graph modules that have no other mode."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager, nullcontext, redirect_stderr
from contextvars import ContextVar
from dataclasses import dataclass
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
FULL = "highest"  # of torch.set_float32_matmul_precision
_asked = ContextVar[str | None]("asked", default=None)  # what the user's process has set, if that is not FULL
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
    for inner in nn.Module.modules(module):
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


_WRITTEN = ("_parameters", "_buffers", "_modules")  # dicts of a module that others write while it is in evaluation mode


@dataclass(frozen=True)
class State:
    """What modules hold: their attributes, and the content of those that are dicts, such as hooks.

    whole: also parameters, buffers and submodules, and the code of a graph
    """

    held: tuple[tuple[nn.Module, dict[str, Any], dict[str, dict[Any, Any]]], ...]
    whole: bool

    def has(self, module: nn.Module, value: Any) -> bool:
        """Of a graph, which keeps its code in attributes too, only what holds a tensor or None, unless it is whole."""
        return self.whole or value is None or isinstance(value, Tensor) or not isinstance(module, fx.GraphModule)


def state_of(module: nn.Module, whole: bool = False) -> State:
    """What a module and its submodules hold now, among it what forward keeps for later."""
    blank = State((), whole)
    held = []
    for m in nn.Module.modules(module):
        fields = {name: value for name, value in vars(m).items() if blank.has(m, value)}
        dicts = {n: dict(v) for n, v in fields.items() if isinstance(v, dict) and (whole or n not in _WRITTEN)}
        held.append((m, fields, dicts))
    return State(tuple(held), whole)


def moved(before: State) -> bool:
    """Whether attributes hold other tensors than before, or new ones."""
    return any(
        isinstance(value, Tensor) and fields.get(name) is not value
        for module, fields, _ in before.held
        for name, value in vars(module).items()
    )


def put_back(before: State) -> None:
    """Gives attributes and their dicts what they held before; new ones are deleted.

    All of them: a tensor may be kept together with the shape that it was made for, and hooks together with the flag
    that they are registered.
    """
    for module, fields, dicts in before.held:
        now = vars(module)
        for name in [name for name, value in now.items() if name not in fields and before.has(module, value)]:
            del now[name]
        now.update({name: value for name, value in fields.items() if now.get(name, now) is not value})
        for name, content in dicts.items():
            if [(k, id(v)) for k, v in fields[name].items()] != [(k, id(v)) for k, v in content.items()]:
                fields[name].clear()
                fields[name].update(content)


@contextmanager
def forgetting(module: nn.Module, state: State) -> Iterator[None]:
    """Starts from a state, and keeps nothing that forward assigns to attributes, while the module is exported.

    What it has kept for the sizes of the example, such as the anchors of a detector, is then computed in the graph.
    torch.export refuses a forward that leaves other tensors in attributes than it found.
    """
    now = state_of(module)

    inner = module.forward

    @wraps(inner)
    def forward(*args: Any, **kwargs: Any) -> Any:
        before = state_of(module)
        try:
            return inner(*args, **kwargs)
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
    modes = {part: part.training for module in modules for part in nn.Module.modules(module) if part.training}
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
def computing() -> Iterator[None]:
    """Leaves torch.inference_mode, in which tensors have no version counters and no gradients can be computed.

    Denormal numbers, which training with weight decay leaves in dead filters, count as zero on this thread's CPU: a
    convolution with them takes up to a hundred times as long.

    Matrix products have full precision, whatever torch.set_float32_matmul_precision says, except those of the model
    (see `of_the_model`).
    """
    flushed = float(torch.full((1,), torch.finfo(torch.float32).tiny) / 2) == 0
    asked = _matmul_precision()
    outermost = _asked.get() is None and asked not in (None, FULL)
    with torch.inference_mode(False) if torch.is_inference_mode_enabled() else nullcontext():
        torch.set_flush_denormal(True)
        token = _asked.set(asked) if outermost else None
        try:
            if outermost:
                torch.set_float32_matmul_precision(FULL)
            yield
        finally:
            torch.set_flush_denormal(flushed)
            if token is not None:
                _asked.reset(token)
                torch.set_float32_matmul_precision(str(asked))


@contextmanager
def of_the_model() -> Iterator[None]:
    """The model's own matrix products, on samples: in the precision that torch.set_float32_matmul_precision says.

    With "medium", processors with bfloat16 matrix units compute them several times faster. The sums and the solutions
    of least squares, which do not bear such errors, are computed outside of this context.
    """
    asked = _asked.get()
    if asked is None:
        yield
        return
    torch.set_float32_matmul_precision(asked)
    try:
        yield
    finally:
        torch.set_float32_matmul_precision(FULL)


def _matmul_precision() -> str | None:
    """The precision that is set; None where it was set by backend, which torch does not let this function tell."""
    try:
        return torch.get_float32_matmul_precision()
    except RuntimeError:
        return None
