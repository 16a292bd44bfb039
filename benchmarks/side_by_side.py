"""Implementations of one attention side by side: the problem, its fp64 answer, times and errors."""

from __future__ import annotations

import statistics
import time
import traceback
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

Row = dict[str, Any]
#: Attention of q, k and v, [B, H, N, D].
Call = Callable[[Tensor, Tensor, Tensor], Tensor]
#: Queries whose results are compared with fp64.
SAMPLED = 64
#: Milliseconds from which a run is timed three times, as more would take too long.
_SLOW = 150.0


@dataclass(frozen=True, eq=False)
class Problem:
    """Causal attention to selected keys, and to all of them where nothing is selected.

    Attributes:
        q, k, v: [1, H, N, D], stored as [1, N, H, D].
        grad_out: gradient of the output, stored likewise.
        lists: index and count of a selection, or None.
        unit_q, unit_kv: of the selection.
        offset: keys before that of the first query.
    """

    q: Tensor
    k: Tensor
    v: Tensor
    grad_out: Tensor
    lists: tuple[Tensor, Tensor] | None = None
    unit_q: int = 1
    unit_kv: int = 1
    offset: int = 0

    @property
    def inputs(self) -> tuple[Tensor, Tensor, Tensor]:
        return self.q, self.k, self.v

    @property
    def group(self) -> int:
        return self.q.shape[1] // self.k.shape[1]

    @property
    def scale(self) -> float:
        return float(self.q.shape[3] ** -0.5)

    @property
    def pairs(self) -> float:
        """Pairs of queries and keys that are attended to, all heads together."""
        n = self.q.shape[2]
        if self.lists is None:
            return self.q.shape[1] * n * (n + 1) / 2
        own = self.unit_q * self.unit_kv * self.q.shape[1] / self.lists[0].shape[1]
        return float(self.lists[1].double().sum()) * own

    def listed(self, head: int, row: int) -> Tensor:
        """The keys in a list, those after a query among them."""
        assert self.lists is not None
        index, count = self.lists
        chosen = index[0, head, row, : int(count[0, head, row])].long()
        within = torch.arange(self.unit_kv, device=self.q.device)
        keys = (chosen[:, None] * self.unit_kv + within).flatten()
        return keys[keys < self.k.shape[2]]

    def keys(self, head: int, token: int) -> Tensor:
        """The keys that a query attends to, for a head of keys."""
        if self.lists is None:
            return torch.arange(token + self.offset + 1, device=self.q.device)
        keys = self.listed(head, token // self.unit_q)
        return keys[keys <= token + self.offset]

    def expanded(self) -> Problem:
        """With keys and values repeated for every query head."""
        each = self.group
        k, v = (
            t.transpose(1, 2).repeat_interleave(each, 2).transpose(1, 2) for t in self.inputs[1:]
        )
        return replace(self, k=k, v=v)


def wait() -> None:
    if torch.cuda.is_available():
        torch.cuda.synchronize()


def median_ms(run: Callable[[], Any], rep: float = 60) -> float:
    """Median on the device's clock; on that of the host, of one run, where there is no GPU."""
    run()
    once = _once_ms(run)
    if not torch.cuda.is_available():
        return once
    if once > _SLOW:
        return statistics.median([once, _once_ms(run), _once_ms(run)])
    from triton.testing import do_bench

    return float(do_bench(run, warmup=int(rep / 3), rep=int(rep), return_mode="median"))


def _once_ms(run: Callable[[], Any]) -> float:
    if not torch.cuda.is_available():
        start = time.perf_counter()
        run()
        return (time.perf_counter() - start) * 1e3
    ends = [torch.cuda.Event(enable_timing=True) for _ in range(2)]
    ends[0].record()
    run()
    ends[1].record()
    wait()
    return float(ends[0].elapsed_time(ends[1]))


def graphed(run: Callable[[], Any]) -> Callable[[], Any]:
    """What replays ``run`` in a CUDA graph; ``run`` itself where there is no GPU."""
    run()
    if not torch.cuda.is_available():
        return run
    wait()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        run()
    return graph.replay


def attempt(names: Row, measured: Callable[[], Row]) -> Row:
    """The row of a measurement; where it fails, what it said."""
    start = time.perf_counter()
    try:
        found = measured()
    except Exception as error:
        found = failure(error)
    if torch.cuda.is_available():
        torch.cuda.empty_cache()
    return {**names, **found, "took_s": time.perf_counter() - start}


def failure(error: Exception) -> Row:
    """What an error says, and where it was raised."""
    where = traceback.extract_tb(error.__traceback__)[-1]
    place = f"{where.filename.rpartition('/')[2]}:{where.lineno}"
    return {"error": f"{type(error).__name__} at {place}: {error}"[:500]}


def measure(p: Problem, call: Call) -> Row:
    """Times of forward and backward, and errors against fp64 of sampled queries and keys.

    Where the backward fails, the row has what it said, and the forward.
    """
    inputs = [t.detach().requires_grad_() for t in p.inputs]
    out = call(*inputs)
    width = p.q.shape[3] + p.v.shape[3]
    row = {**_rate("forward", lambda: call(*inputs), p, width), **errors(p, out)}

    def backward() -> tuple[Tensor, ...]:
        return torch.autograd.grad(out, inputs, p.grad_out, retain_graph=True)

    try:
        grads = backward()
        row |= _rate("backward", backward, p, 2 * width + p.q.shape[3])
    except Exception as error:
        return row | {f"backward_{name}": said for name, said in failure(error).items()}
    return row | errors(p, out, grads[0]) | key_errors(p, *grads[1:])


def _rate(name: str, run: Callable[[], Any], p: Problem, width: int) -> Row:
    """Time, and rate; ``width`` counts the products of a pair."""
    ms = median_ms(run)
    return {f"{name}_ms": ms, f"{name}_tflops": 2 * width * p.pairs / ms / 1e9}


def errors(p: Problem, out: Tensor, dq: Tensor | None = None) -> Row:
    """The largest errors of sampled queries against fp64, relative to the largest value."""
    found = {"out": out.detach()} if dq is None else {"out": out.detach(), "dq": dq}
    worst, most = dict.fromkeys(found, 0.0), dict.fromkeys(found, 1e-30)
    for token, head, own in sampled(p):
        for name, wanted in zip(found, _exact(p, token, head, own), strict=False):
            got = found[name][0, own, token].double()
            worst[name] = max(worst[name], float((got - wanted).abs().max()))
            most[name] = max(most[name], float(wanted.abs().max()))
    return {f"{name}_error": worst[name] / most[name] for name in found}


def sampled(p: Problem) -> Iterator[tuple[int, int, slice]]:
    """Tokens, a head of keys for each, and its query heads."""
    for i, token in enumerate(torch.linspace(0, p.q.shape[2] - 1, SAMPLED).long().tolist()):
        head = i % p.k.shape[1]
        yield token, head, slice(head * p.group, (head + 1) * p.group)


def _exact(p: Problem, token: int, head: int, own: slice) -> tuple[Tensor, Tensor]:
    """The output [G, D] of a query, and the gradient of that query, in fp64."""
    keys = p.keys(head, token)
    k, v = p.k[0, head, keys].double(), p.v[0, head, keys].double()
    q, grad = p.q[0, own, token].double(), p.grad_out[0, own, token].double()
    weights = (q @ k.T * p.scale).softmax(-1)
    out = weights @ v
    slope = weights * (grad @ v.T - (grad * out).sum(-1, keepdim=True))
    return out, slope @ k * p.scale


def key_errors(p: Problem, dk: Tensor, dv: Tensor) -> Row:
    """The largest errors of gradients of two units of keys, relative to the largest value.

    Each comes from all queries that select the unit. Where all is attended to there are too many.
    """
    if p.lists is None:
        return {}
    units = -(-p.k.shape[2] // p.unit_kv)
    row: Row = {}
    for head, unit in ((0, units // 2), (p.k.shape[1] - 1, units - 1)):
        own = slice(unit * p.unit_kv, (unit + 1) * p.unit_kv)
        wanted = _exact_of_keys(p, head, unit)
        for name, got, exact in zip(("dk", "dv"), (dk, dv), wanted, strict=True):
            error = (got[0, head, own].double() - exact).abs().max() / exact.abs().max()
            row[f"{name}_error"] = max(row.get(f"{name}_error", 0.0), float(error))
    return row


def _exact_of_keys(p: Problem, head: int, unit: int) -> tuple[Tensor, Tensor]:
    """The gradients of the keys and values of a unit, in fp64."""
    assert p.lists is not None
    index, count = (t[0, head] for t in p.lists)
    used = torch.arange(index.shape[1], device=index.device) < count[:, None]
    heads = slice(head * p.group, (head + 1) * p.group)
    own = slice(unit * p.unit_kv, (unit + 1) * p.unit_kv)
    dk, dv = (torch.zeros_like(t[0, head, own], dtype=torch.float64) for t in (p.k, p.v))
    for row in ((index == unit) & used).any(1).nonzero().flatten().tolist():
        first, keys = row * p.unit_q, p.listed(head, row)
        q, grad = (t[0, heads, first : first + p.unit_q].double() for t in (p.q, p.grad_out))
        k, v = (t[0, head, keys].double() for t in (p.k, p.v))
        token = torch.arange(first, first + q.shape[1], device=keys.device)[:, None]
        hidden = keys > token + p.offset
        weights = (q @ k.T * p.scale).masked_fill(hidden, float("-inf")).softmax(-1).nan_to_num(0)
        slope = grad @ v.T - (grad * (weights @ v)).sum(-1, keepdim=True)
        at = keys // p.unit_kv == unit
        dk += torch.einsum("htk,htd->kd", (weights * slope)[..., at], q) * p.scale
        dv += torch.einsum("htk,htd->kd", weights[..., at], grad)
    return dk, dv
