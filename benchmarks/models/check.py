"""One model, one implementation, one case: what is found and rewritten, and how exact it is."""

from __future__ import annotations

import time
import traceback
import warnings
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.fx import GraphModule

from benchmarks.models.entry import Entry, Inputs
from benchmarks.models.exactness import Exactness, exactness, values
from sparse_compile.inspect.explain import Examined, explain_with
from sparse_compile.inspect.report import Report
from sparse_compile.options import Options
from sparse_compile.passes import pipeline
from sparse_compile.sites.plan import Trace

#: Whatever can be rewritten is, in blocks that are small beside these problems.
OPTIONS = {"decide": "sparse", "block": (16, 16)}


@dataclass(frozen=True)
class Case:
    """What is compared.

    Attributes:
        padding: of the inputs.
        training: whether gradients of all parameters are, too.
        dropout: what the model has by default. With it nothing is compared.
    """

    padding: str
    training: bool
    dropout: bool = False

    @property
    def name(self) -> str:
        """As in the table: ``left train``."""
        words = [self.padding, "train" if self.training else "eval"]
        return " ".join([*words, "dropout"] if self.dropout else words)


@dataclass(frozen=True)
class Site:
    """One attention: what became of it, and why; density only where it is known."""

    where: str
    rewritten: bool
    reason: str
    density: float | None = None


@dataclass(frozen=True)
class Result:
    """What a case showed.

    Attributes:
        model, implementation, case: which.
        graphs: that torch.compile made of a call.
        sites: every attention.
        exactness: against eager; None: not compared.
        seconds: until the first call, with its gradients, was done.
        error: the exception, and where it was raised; empty without one.
        commit: that it was made at.
    """

    model: str
    implementation: str
    case: str
    graphs: int = 0
    sites: tuple[Site, ...] = ()
    exactness: Exactness | None = None
    seconds: float = 0.0
    error: str = ""
    commit: str = ""

    @property
    def rewritten(self) -> int:
        """How many attentions are."""
        return sum(site.rewritten for site in self.sites)

    @property
    def ok(self) -> bool:
        """Whether nothing was raised, and every number is within the bar."""
        return not self.error and (self.exactness is None or self.exactness.within)


def cases(entry: Entry) -> tuple[Case, ...]:
    """Every case of a model."""
    found = [Case(padding, training) for padding in entry.paddings for training in (False, True)]
    return (*found, *([Case("right", True, True)] if entry.dropout else []))


def units(entries: Iterable[Entry]) -> list[tuple[Entry, str, Case]]:
    """What :func:`check` takes: every case of every implementation of models."""
    return [(e, how, case) for e in entries for how in e.implementations for case in cases(e)]


def check(entry: Entry, implementation: str, case: Case) -> Result:
    """The result of a case; an exception is part of it."""
    made = Result(entry.name, implementation, case.name)
    torch._dynamo.reset()
    try:
        with warnings.catch_warnings(), torch.set_grad_enabled(case.training):
            warnings.simplefilter("ignore")
            model = entry.build(implementation, case.dropout).train(case.training)
            return _checked(made, model, entry.inputs(case.padding), case)
    except Exception as error:
        return replace(made, error=_shown(error))


def _checked(made: Result, model: nn.Module, inputs: Inputs, case: Case) -> Result:
    if not case.training:  # the densities are those of the inputs: once is enough
        made = _reported(made, explain_with(OPTIONS)(model, **inputs))
        torch._dynamo.reset()
    seen: list[tuple[Trace, ...]] = []
    began = time.perf_counter()
    call = torch.compile(model, backend=_rewriting(seen, case.training))
    ours = values(call, model, inputs, case.training)
    made = replace(made, seconds=round(time.perf_counter() - began, 2))
    if case.training:
        sites = tuple(Examined(trace).report() for traces in seen for trace in traces)
        made = _reported(made, Report(sites, len(seen)))
    if case.dropout:
        return made
    return replace(made, exactness=exactness(ours, model, inputs, case.training))


def _reported(made: Result, report: Report) -> Result:
    sites = tuple(Site(s.where, s.rewritten, s.reason, s.density) for s in report.sites)
    return replace(made, graphs=report.graphs, sites=sites)


def _rewriting(seen: list[tuple[Trace, ...]], training: bool) -> Callable[..., Any]:
    """What the backend makes of a graph, which then runs operator after operator."""

    def compiled(gm: GraphModule, inputs: Sequence[Any]) -> Callable[..., Any]:
        seen.append(pipeline.run(gm, inputs, Options.parse(OPTIONS)))
        if not training:
            return gm.forward
        made: Callable[..., Any] = torch._dynamo.lookup_backend("aot_eager")(gm, inputs)
        return made

    return compiled


def _shown(error: Exception) -> str:
    frame = traceback.extract_tb(error.__traceback__)[-1]
    place = f"{Path(frame.filename).name}:{frame.lineno} in {frame.name}"
    return f"{type(error).__name__} at {place}: {error}"
