"""Whole models side by side: their correctness first, then times and peak memory, in one run.

All peers get the same weights, rounded to the dtype that is measured. The truth is a run of them in
fp32, without TF32, by a :class:`Truth`: outputs and gradients of each peer are compared with it
before anything is timed.
"""

from __future__ import annotations

import contextlib
import functools
import statistics
import time
import warnings
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor, nn

from benchmarks.attempts import Budget, attempted, clean, free
from benchmarks.turns import Turns

Inputs = dict[str, Tensor]
Row = dict[str, Any]

#: What Inductor is called; tests replace it.
INDUCTOR = "inductor"


@dataclass(frozen=True)
class Peer:
    """How a model is run.

    Attributes:
        name: shown in results.
        build: makes the model in fp32 on a device, always with the same weights.
        backend: of torch.compile; empty to run it eagerly.
        options: of the backend.
        ours: whether this library computes it.
        ways: arguments of calls and names of functions that torch.compile ignores; each is tried
            until one of them trains.
        after: measured only if the peer of this name failed.
        limit: whether it leaves the attention out: no attention makes the model faster than that.
    """

    name: str
    build: Callable[[], nn.Module]
    backend: str = ""
    options: dict[str, Any] | None = None
    ours: bool = False
    ways: tuple[Way, ...] = field(default_factory=lambda: (Way(),))
    after: str = ""
    limit: bool = False


@dataclass(frozen=True)
class Way:
    """What is tried to make a peer run.

    Attributes:
        arguments: of its calls, besides the inputs.
        quiet: whether torch.compile ignores warnings in the code that it traces, at which it would
            break the graph: transformers' block masks are then made in compiled code.
    """

    arguments: dict[str, Any] = field(default_factory=dict)
    quiet: bool = False

    @contextlib.contextmanager
    def tried(self) -> Iterator[None]:
        """Within it torch.compile traces this way."""
        ignored = getattr(torch._dynamo.config, "ignore_logging_functions", None)
        if not self.quiet or ignored is None:
            yield
            return
        with torch._dynamo.config.patch(ignore_logging_functions={*ignored, warnings.warn}):
            yield


#: Of transformers' flex_attention: block masks in the graph, else outside; with fewer stages where
#: the default kernel asks for more shared memory than there is.
FLEX_WAYS = (
    Way(quiet=True),
    Way(),
    Way({"kernel_options": {"BLOCK_M": 64, "BLOCK_N": 64, "num_stages": 1}}, quiet=True),
)


@dataclass(frozen=True)
class Problem:
    """A model, its inputs and its peers.

    Attributes:
        name: of the model.
        truth: makes the model in fp32 whose results are the truth.
        peers: what is compared; the first of them that runs is the yardstick.
        inputs: of a call, on a device.
        trained: whether a training step is timed, too.
        bars: the least speed-ups: over any other peer, and over the first one.
        facts: written into each row.
    """

    name: str
    truth: Callable[[], nn.Module]
    peers: tuple[Peer, ...]
    inputs: Inputs
    trained: bool = True
    bars: tuple[float, float] = (1.05, 1.05)
    facts: Row = field(default_factory=dict)


@dataclass(frozen=True)
class Setting:
    """How everything is measured.

    Attributes:
        device: ``"cuda"`` or ``"cpu"``.
        dtype: of the weights of all peers.
        seconds: for one problem, all peers together; what comes too late is not measured.
        calls: that are timed.
        kernels: so many that take most of a call are named, on a GPU.
        turns: with other processes that use the same GPU.
    """

    device: str = "cuda"
    dtype: torch.dtype = torch.bfloat16
    seconds: float = 240.0
    calls: int = 7
    kernels: int = 0
    turns: Turns = field(default_factory=Turns)


@dataclass(frozen=True)
class Results:
    """What a model gives: its output, and the gradients of its parameters; on the CPU, fp32."""

    out: Tensor
    gradients: dict[str, Tensor]


def compared(
    problem: Problem, setting: Setting, note: Callable[[Row], None] = lambda row: None
) -> list[Row]:
    """All peers of a problem.

    Args:
        problem: the model.
        setting: how it is measured.
        note: gets each row when it is known.
    """
    budget = Budget(setting.seconds)
    truth, why = attempted(lambda: truth_of(problem, setting), budget)
    rows: list[Row] = []
    for peer in problem.peers:
        if stands_aside(peer, rows):
            continue
        rows.append(row_of(problem, peer, setting, truth, why, budget))
        note(rows[-1])
    return rows


def stands_aside(peer: Peer, rows: list[Row]) -> bool:
    """Whether a peer is not measured since that for which it would stand in did not fail."""
    return any(row["peer"] == peer.after and not _failed(row) for row in rows)


def row_of(
    problem: Problem, peer: Peer, setting: Setting, truth: Results | None, why: str, budget: Budget
) -> Row:
    """What is known of one peer; ``why`` says why the truth is not known, if it is not."""
    row: Row = {"model": problem.name, "peer": peer.name, **problem.facts}
    if truth is None:
        row["unchecked"] = f"the truth is not known: {why}"
    truth = None if peer.limit else truth
    return row | best_way(
        peer,
        lambda one: _measured(problem, one, setting, truth, budget),
        lambda: budget.left > 0,
    )


def _failed(row: Row) -> bool:
    return any(key.startswith("no_") for key in row)


def best_way(peer: Peer, measure: Callable[[Peer], Row], is_time: Callable[[], bool]) -> Row:
    """The first way that gives all that is asked for; else the one that gives most.

    Args:
        peer: with its ways.
        measure: measures it with one of them.
        is_time: whether another may be tried.
    """
    best: Row = {}
    for number, way in enumerate(peer.ways):
        with way.tried():
            row = measure(replace(peer, ways=(way,)))
        if len(peer.ways) > 1:
            row["way"] = number
        if not best or sum(k.endswith("_ms") for k in row) > sum(k.endswith("_ms") for k in best):
            best = row
        if not _failed(row) or not is_time():
            break
    return best


def _measured(
    problem: Problem, peer: Peer, setting: Setting, truth: Results | None, budget: Budget
) -> Row:
    """One peer, one way: what it gives is compared, and then timed."""
    clean()
    with setting.turns.shared():
        made, why = attempted(lambda: _Run(problem, peer, setting), budget)
        if made is None:
            return {"no_forward": why}
        row = _prepared(made, truth, budget)
        free()
    with setting.turns.alone():
        if setting.turns.path and "out of memory" in row.values():  # others may have held it
            row = _prepared(made, truth, budget)
        for what, call in made.phases():
            if f"no_{what}" in row:
                break
            times, why = attempted(lambda call=call: _timed(call, setting), budget)
            row |= {f"{what}_{key}": value for key, value in (times or {f"no_{what}": why}).items()}
        made.module = None
        del made
        clean()
    return row


def _prepared(made: _Run, truth: Results | None, budget: Budget) -> Row:
    """A first call of each kind, which is compiled and compared with the truth."""
    row: Row = {}
    for what, call in made.phases():
        began = time.perf_counter()
        given, why = attempted(call, budget)
        if why:
            row[f"no_{what}"] = why
            break
        row[f"{what}_compile_s"] = round(time.perf_counter() - began, 1)
        if truth is not None:
            row |= _errors(what, given, made, truth)
    return row


class _Run:
    """A model under a peer, with its calls."""

    def __init__(self, problem: Problem, peer: Peer, setting: Setting) -> None:
        self.trained = problem.trained
        module = peer.build().to(setting.dtype)
        self.module: nn.Module | None = module.train(problem.trained)
        call: Any = module
        if peer.backend:
            backend = INDUCTOR if peer.backend == "inductor" else peer.backend
            call = torch.compile(module, backend=backend, options=peer.options)
        self._call = functools.partial(call, **problem.inputs, **peer.ways[0].arguments)

    def phases(self) -> list[tuple[str, Callable[[], Tensor]]]:
        """Names of what is measured, and its calls."""
        known: list[tuple[str, Callable[[], Tensor]]] = [("forward", self.forward)]
        return [*known, ("step", self.step)] if self.trained else known

    def forward(self) -> Tensor:
        """The output, without gradients."""
        with torch.no_grad():
            out: Tensor = self._call()[0]
        return out

    def step(self) -> Tensor:
        """Forward and backward of a weighted sum of the output, which is returned."""
        assert self.module is not None
        self.module.zero_grad(set_to_none=True)
        out: Tensor = self._call()[0]
        loss_of(out, out.dtype).backward()
        return out.detach()


def loss_of(out: Tensor, dtype: torch.dtype) -> Tensor:
    """A sum of the output with fixed random weights: behind a norm, squares have no gradients.

    Args:
        out: [B, ...].
        dtype: in which the weights are drawn, the same for all that is compared.
    """
    generator = torch.Generator(out.device).manual_seed(1)
    weights = torch.randn(out.shape[1:], generator=generator, device=out.device, dtype=dtype)
    return (out.float() * weights.float()).sum() / out[0].numel() ** 0.5


def truth_of(problem: Problem, setting: Setting) -> Results:
    """Output and gradients in fp32, from weights in the dtype that is measured.

    Some sequences at a time, since fp32 takes more memory; the loss is a sum over them.
    """
    clean()
    module = problem.truth().to(setting.dtype).float().train(problem.trained)
    outs = []
    for inputs in _eighths(problem.inputs):
        with torch.set_grad_enabled(problem.trained):
            out = module(**inputs)[0]
        if problem.trained:
            loss_of(out, setting.dtype).backward()
        outs.append(out.detach().cpu())
        del out
    return Results(torch.cat(outs), _gradients(module) if problem.trained else {})


def _eighths(inputs: Inputs) -> Iterator[Inputs]:
    """Inputs of an eighth of the batch each, or of one entry, floating ones in fp32."""
    whole = {name: x.float() if x.is_floating_point() else x for name, x in inputs.items()}
    batch = len(next(iter(whole.values())))
    step = max(1, batch // 8)
    for first in range(0, batch, step):
        yield {name: x[first : first + step] for name, x in whole.items()}


def _gradients(module: nn.Module) -> dict[str, Tensor]:
    named = module.named_parameters()
    return {name: p.grad.detach().float().cpu() for name, p in named if p.grad is not None}


def _errors(what: str, out: Tensor, run: _Run, truth: Results) -> Row:
    """Relative errors: of the output; or of all gradients together, and of the worst parameter."""
    if what == "forward":
        return {"forward_error": _relative(out.float().cpu(), truth.out)}
    assert run.module is not None
    found = _gradients(run.module)
    run.module.zero_grad(set_to_none=True)
    pairs = {name: (found.get(name, torch.zeros(())), t) for name, t in truth.gradients.items()}
    sizes = {name: float(t.norm()) for name, (_, t) in pairs.items()}
    apart = {name: float((g - t).norm()) for name, (g, t) in pairs.items()}
    total = sum(size**2 for size in sizes.values()) ** 0.5
    row: Row = {"gradient_error": sum(e**2 for e in apart.values()) ** 0.5 / max(total, 1e-30)}
    # Of those that matter: a gradient that is all rounding is as wrong as any.
    shares = {n: apart[n] / size for n, size in sizes.items() if size > 1e-3 * max(sizes.values())}
    if shares:
        name = max(shares, key=lambda n: shares[n])
        row["worst_gradient"] = [name, shares[name]]
    return row


def _relative(found: Tensor, truth: Tensor) -> float:
    return float((found - truth).norm() / truth.norm())


def _timed(call: Callable[[], Any], setting: Setting) -> Row:
    """Median milliseconds of some calls after two, all of them, and the peak of memory in GiB."""
    on_gpu, times = setting.device == "cuda", []
    for number in range(setting.calls + 2):
        if on_gpu:
            torch.cuda.synchronize()
            if number == 2:
                torch.cuda.reset_peak_memory_stats()
        began = time.perf_counter()
        call()
        if on_gpu:
            torch.cuda.synchronize()
        times.append((time.perf_counter() - began) * 1e3)
        if number > 3 and sum(times) > 2e4:
            break
    row: Row = {"ms": round(statistics.median(times[2:]), 3)}
    row["spread_ms"] = [round(min(times[2:]), 3), round(max(times[2:]), 3)]
    if on_gpu:
        row["gib"] = round(torch.cuda.max_memory_allocated() / 2**30, 3)
        if setting.kernels:
            row["kernels"] = _kernels(call, setting.kernels)
    return row


def _kernels(call: Callable[[], Any], most: int) -> list[list[Any]]:
    """Names, milliseconds and numbers of launches of the kernels that take most of a call."""
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as seen:
        call()
        torch.cuda.synchronize()
    events = sorted(seen.key_averages(), key=lambda event: -event.self_device_time_total)
    return [
        [event.key[:60], round(event.self_device_time_total / 1e3, 3), event.count]
        for event in events[:most]
    ]
