"""Attention over selected keys beside its peers, on one GPU, in one run.

    python -m zipfile -e fla_core-0.6.0-py3-none-any.whl /tmp/fla
    python -m zipfile -e einops-0.8.2-py3-none-any.whl /tmp/fla
    PYTHONPATH=.:/tmp/fla python -m benchmarks.selected_peers --out selected_peers.json

``--cases`` chooses some of them; results are written after every measurement. A peer that cannot be
imported, or fails, has a row that says why. Times are medians, of three runs where one takes more
than 150 ms. Errors are those of sampled queries against fp64. ``--dry`` uses small sizes, and runs
without a GPU.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict
from typing import Any

import torch
from torch import Tensor

import sparse_compile
from benchmarks import fla_peers, flex_selected
from benchmarks.environment import write_json
from benchmarks.selected import DIM, KV_HEADS, Q_HEADS, operands, random_causal
from benchmarks.selected_serving import decoding, indexer, latent
from benchmarks.selected_sizes import DRY, Sizes
from benchmarks.side_by_side import (
    Call,
    Problem,
    Row,
    attempt,
    errors,
    failure,
    graphed,
    measure,
    median_ms,
)
from sparse_compile import patterns as P
from sparse_compile.expr import KV, MaskExpr, Q
from sparse_compile.layout.listed import places
from sparse_compile.ops import ATTENTION
from sparse_compile.selection import Selection, canonical
from sparse_compile.selection.select import select
from sparse_compile.spec import AttentionSpec, are_blocks

CAUSAL = MaskExpr(KV <= Q)
HEADS = (Q_HEADS, KV_HEADS, DIM)


def problem(
    sizes: Sizes, n: int, lists: tuple[Tensor, Tensor] | None, unit_q: int, unit_kv: int
) -> Problem:
    q, k, v = operands(1, n, n, sizes.device)
    grad = operands(1, n, n, sizes.device)[0]
    return Problem(q, k, v, grad, lists, unit_q, unit_kv)


def per_query(sizes: Sizes, n: int, unit: int, most: int) -> Problem:
    """Each query selects random units up to its own; repeated ones count once."""
    lists = canonical(random_causal(n, unit, most, sizes.device), n // unit)
    return problem(sizes, n, lists, 1, unit)


def per_block(sizes: Sizes, n: int) -> Problem:
    """Each 128 queries select their own block of 128 keys and random ones, 10 % of the visible."""
    block, device = flex_selected.BLOCK, sizes.device
    own = torch.arange(n // block, device=device)
    draws = torch.rand(1, KV_HEADS, len(own), len(own), device=device)
    draws = draws.masked_fill(own > own[:, None], -1).masked_fill(own == own[:, None], 2)
    count = (own // 10 + 1).to(torch.int32).expand(1, KV_HEADS, len(own)).contiguous()
    index = draws.argsort(dim=-1, descending=True)[..., : (len(own) - 1) // 10 + 1]
    used = torch.arange(index.shape[-1], device=device) < count[..., None]
    return problem(sizes, n, canonical(torch.where(used, index, -1), len(own)), block, block)


def ours(p: Problem) -> Call:
    """The operator, with the lists at hand; for whole blocks what the library makes of them."""
    assert p.lists is not None
    index, count = p.lists
    if are_blocks(p.unit_q, p.unit_kv, p.q.device.type):
        mask = P.Causal() & P.Selected(index, p.unit_kv, unit_q=p.unit_q, count=count)
        return lambda q, k, v: sparse_compile.attention(q, k, v, mask, scale=p.scale)
    text = AttentionSpec.of_units(CAUSAL, p.unit_q, p.unit_kv).text
    return lambda q, k, v: ATTENTION(q, k, v, [], [], [], [index, count], p.scale, text)[0]


def choosing(pattern: Any) -> Call:
    """Selection and then attention."""
    text = AttentionSpec.of_units(CAUSAL, pattern.unit_q, pattern.unit_kv).text

    def call(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        found = select(pattern, q.detach(), k.detach(), CAUSAL)
        scale = q.shape[3] ** -0.5
        lists = [found.index, found.count]
        out: Tensor = ATTENTION(q, k, v, [], [], [], lists, scale, text)[0]
        return out

    return call


def per_query_case(unit: int, most: int) -> Callable[[Sizes], Iterator[Row]]:
    """Random units for every query: ours, FLA, dense."""

    def case(sizes: Sizes) -> Iterator[Row]:
        p = per_query(sizes, sizes.n, unit, most)
        names = {"case": f"{sizes.n} tokens, top {most} of units of {unit} for each query"}
        yield attempt({**names, "by": "ours"}, lambda: measure(p, ours(p)))
        yield from with_fla(names, p)
        yield from with_dense(names, p)

    return case


def with_fla(names: Row, p: Problem) -> Iterator[Row]:
    """FLA's attention to the same blocks, its autotuner's work done before."""
    if not p.q.is_cuda:
        return

    def prepare() -> Row:
        fla_peers.prepare(HEADS)
        return {"tuned_at": fla_peers.TUNED_AT}

    yield attempt({**names, "by": "fla, autotuning"}, prepare)
    yield attempt({**names, "by": "fla"}, lambda: measure(p, fla_peers.selected(p)))


def with_dense(names: Row, p: Problem) -> Iterator[Row]:
    """Dense causal attention by SDPA."""
    for backend in ("CUDNN_ATTENTION", "FLASH_ATTENTION") if p.q.is_cuda else ("MATH",):

        def run(backend: str = backend) -> Row:
            whole, call, note = flex_selected.dense(p, backend)
            return {"note": note, **measure(whole, call)}

        yield attempt({**names, "by": f"dense causal, {backend}"}, run)


def blocks(sizes: Sizes) -> Iterator[Row]:
    """Blocks of 128 queries select blocks of 128 keys: ours, FlexAttention, FLA."""
    p = per_block(sizes, sizes.n)
    names = {"case": f"{sizes.n} tokens, 128 queries select 10 % of the blocks of 128"}
    yield attempt({**names, "by": "ours"}, lambda: measure(p, ours(p)))

    def run_flex() -> Row:
        return measure(p, flex_selected.flex(flex_selected.by_block(p), sizes.on_gpu))

    yield attempt({**names, "by": "flex, BlockMask.from_kv_blocks"}, run_flex)
    for row in with_fla(names, p):
        yield {**row, "note": "the list of a block repeated for each of its queries"}


def flex(sizes: Sizes) -> Iterator[Row]:
    """Each query selects: ours, and FlexAttention with a table inside its blocks."""
    p = per_query(sizes, sizes.flex_n, 64, 16)
    names = {"case": f"{sizes.flex_n} tokens, top 16 of units of 64 for each query"}
    yield attempt({**names, "by": "ours"}, lambda: measure(p, ours(p)))

    def run() -> Row:
        mask = flex_selected.by_query(p)
        note = f"mask_mod reads a table of all queries and units; {mask.sparsity():.0f} % sparse"
        return {"note": note, **measure(p, flex_selected.flex(mask, sizes.on_gpu))}

    yield attempt({**names, "by": "flex, mask_mod with a table"}, run)


def crossover(sizes: Sizes) -> Iterator[Row]:
    """Selection and attention together against dense forwards, by length."""
    pattern = P.TopK(16, unit_kv=64, diagonal=True)
    call, rows = choosing(pattern), []
    for n in sizes.crossover:
        p = problem(sizes, n, None, 1, 64)
        rows.append(
            attempt({"case": "crossover", "n": n}, lambda p=p: against_dense(p, pattern, call))
        )
        yield rows[-1]
    # In a graph the host's part of the launches does not count.
    yield {"case": "crossover", "wins_from": wins_from(rows, "ours_ms")} | {
        "wins_from_in_a_graph": wins_from(rows, "graph_ms")
    }


def wins_from(rows: Sequence[Row], name: str) -> int | None:
    """The least length from which on a time is below that of the best dense attention."""
    first = None
    for row in reversed(rows):
        if name not in row or row[name] >= row["dense_ms"]:
            break
        first = row["n"]
    return first


def against_dense(p: Problem, pattern: Any, call: Call) -> Row:
    """Forward alone; ``dense_ms`` is the best of the dense ones."""
    row: Row = {"dense_ms": float("inf")}
    with torch.no_grad():
        row["ours_ms"] = median_ms(lambda: call(*p.inputs))
        row["select_ms"] = median_ms(lambda: select(pattern, p.q, p.k, CAUSAL))
        row["graph_ms"] = median_ms(graphed(lambda: call(*p.inputs)))
        for backend in ("CUDNN_ATTENTION", "FLASH_ATTENTION") if p.q.is_cuda else ("MATH",):
            whole, other, note = flex_selected.dense(p, backend, backward=False)
            ms = median_ms(lambda w=whole, other=other: other(*w.inputs))
            row |= {f"{backend}_ms": ms, f"{backend}_note": note}
            row["dense_ms"] = min(row["dense_ms"], ms)
        found = select(pattern, p.q, p.k, CAUSAL)
        chosen = Problem(p.q, p.k, p.v, p.grad_out, (found.index, found.count), 1, 64)
        return {**row, **errors(chosen, call(*p.inputs)), "shared": shared_with_exact(chosen)}


def shared_with_exact(p: Problem) -> float:
    """The least share that the lists of sampled queries have of the choice by means in fp64.

    The choice is of 16 units, the query's own one among them.
    """
    assert p.lists is not None
    least, unit = 1.0, p.unit_kv
    means = p.k[0].double().unflatten(1, (-1, unit)).mean(2)
    for token in torch.linspace(0, p.q.shape[2] - 1, 32).long().tolist():
        own = token // unit
        for head in range(p.k.shape[1]):
            q = p.q[0, head * p.group : (head + 1) * p.group, token].double().sum(0)
            best = (means[head, :own] @ q).topk(min(15, own)).indices.tolist()
            count = int(p.lists[1][0, head, token])
            got = set(p.lists[0][0, head, token, :count].tolist())
            least = min(least, len(got & {*best, own}) / (len(best) + 1))
    return least


def selection(sizes: Sizes) -> Iterator[Row]:
    """Selecting alone, the lists that follow from it, and FLA's selection."""
    p = problem(sizes, sizes.n, None, 1, 64)
    names, units = {"case": f"selecting top 16 of units of 64, {sizes.n} tokens"}, sizes.n // 64
    by_mean = P.TopK(16, unit_kv=64, diagonal=True)
    # What FLA selects: its windows are blocks.
    like_fla = P.TopK(16, unit_kv=64, scorer=P.OverlapPool(64, 64), sink=1, local=2)
    found = select(by_mean, p.q, p.k, CAUSAL)
    any_order = found.index.long().flip(-1)
    for name, run in (
        ("select, means", lambda: select(by_mean, p.q, p.k, CAUSAL)),
        ("select, softmax over means", lambda: select(like_fla, p.q, p.k, CAUSAL)),
        ("canonical", lambda: canonical(any_order, units)),
        ("places", lambda: places(found.index, found.count, units, 16384)),
    ):
        yield attempt({**names, "by": f"ours, {name}"}, lambda run=run: {"ms": median_ms(run)})
    if sizes.on_gpu:

        def peer() -> Row:
            fla_peers.prepare(HEADS)
            share = shared_with(select(like_fla, p.q, p.k, CAUSAL), fla_peers.selection(p, 16, 64))
            return {"ms": median_ms(lambda: fla_peers.selection(p, 16, 64)), "shared": share}

        yield attempt({**names, "by": "fla, mean_pooling and parallel_nsa_topk"}, peer)


def shared_with(found: Selection, other: Tensor) -> float:
    """The share of our lists that those of a peer, [1, N, H, S], have too, of sampled queries."""
    same = total = 0
    for token in torch.linspace(0, other.shape[1] - 1, 64).long().tolist():
        for head in range(other.shape[2]):
            count = int(found.count[0, head, token])
            got = set(found.index[0, head, token, :count].tolist())
            same += len(got & set(other[0, token, head].tolist()))
            total += len(got)
    return same / max(total, 1)


def moba(sizes: Sizes) -> Iterator[Row]:
    """MoBA, selection included, with a head of keys for every head of queries."""
    chunk, most = (512, 3) if sizes.on_gpu else (64, 2)
    pattern = P.MoBA(chunk, most)
    p = problem(sizes, sizes.n, None, 1, pattern.unit_kv).expanded()
    names = {"case": f"MoBA, {most} blocks of {chunk}, {sizes.n} tokens, {Q_HEADS} heads"}

    def run(call: Call) -> Row:
        found = select(pattern, p.q, p.k, CAUSAL)
        chosen = Problem(*p.inputs, p.grad_out, (found.index, found.count), 1, pattern.unit_kv)
        return measure(chosen, call)

    yield attempt({**names, "by": "ours"}, lambda: run(choosing(pattern)))
    if sizes.on_gpu:
        yield attempt({**names, "by": "fla"}, lambda: run(fla_peers.moba(chunk, most)))


def cases() -> dict[str, Callable[[Sizes], Iterator[Row]]]:
    return {
        "top16x64": per_query_case(64, 16),
        "top8x128": per_query_case(128, 8),
        "blocks": blocks,
        "selection": selection,
        "crossover": crossover,
        "decoding": decoding,
        "indexer": indexer,
        "latent": latent,
        "moba": moba,
        "flex": flex,
    }


def line(row: Row) -> str:
    shown = (f"{k} {v:.4g}" if isinstance(v, float) else f"{k} {v}" for k, v in row.items())
    return ", ".join(shown)


def main(argv: Sequence[str] | None = None) -> None:
    every = cases()
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--cases", nargs="+", choices=list(every), default=list(every))
    parser.add_argument("--n", type=int, help="tokens of the training cases")
    parser.add_argument("--flex-n", type=int, help="tokens of the case flex")
    parser.add_argument("--dry", action="store_true", help="small sizes, on the CPU")
    parser.add_argument("--out", help="path of the JSON file")
    args = parser.parse_args(argv)
    given = {"n": args.n, "flex_n": args.flex_n}
    base = asdict(DRY if args.dry else Sizes())
    sizes = Sizes(**base | {name: value for name, value in given.items() if value})
    torch.manual_seed(0)
    rows: list[Row] = []
    for name in args.cases:
        for row in guarded(name, every[name], sizes):
            rows.append(row)
            print(line(row), flush=True)
            if args.out:
                write_json(args.out, rows, problem=asdict(sizes) | {"heads": HEADS})


def guarded(name: str, case: Callable[[Sizes], Iterator[Row]], sizes: Sizes) -> Iterator[Row]:
    """The rows of a case; if its problem cannot be made, a row that says so."""
    try:
        yield from case(sizes)
    except Exception as error:
        yield {"case": name, **failure(error)}


if __name__ == "__main__":
    main()
