"""What layouts cost: time and bytes at a million tokens, and how many more pairs they visit.

python -m benchmarks.layouts --devices cuda cpu --out layouts.json
python -m benchmarks.layouts --ratios --devices --out ratios.json
"""

from __future__ import annotations

import argparse
import functools
import time
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from benchmarks.cases import CASES
from benchmarks.environment import write_json
from benchmarks.ours import forgetter, layout_of, layout_of_spec, spec_of, wall_ms
from sparse_compile import patterns as P

LENGTH, DENSE_LENGTH, RATIO_LENGTH = 1 << 20, 32768, 65536
Row = dict[str, Any]


def starts(n: int, documents: int, device: Any) -> Tensor:
    """int32 [documents + 1]: where documents of unequal lengths start, and ``n``."""
    cuts = torch.randperm(n - 1, generator=torch.Generator().manual_seed(0))[: documents - 1] + 1
    ends = torch.tensor([0, n])
    return torch.cat([ends[:1], cuts.sort().values, ends[1:]]).to(device, torch.int32)


#: ``pattern(n, device)``. The last ones depend on tensors most, so they are measured last.
PATTERNS: dict[str, Callable[[int, Any], P.Pattern]] = {
    "causal window 4096": lambda n, device: P.SlidingWindow(4095, 0),
    "longformer 512, CLS": lambda n, device: P.Longformer(512),
    "strided 1024": lambda n, device: P.Strided(1024),
    "axial": lambda n, device: P.Axial((n // 1024, 1024)),
    "(window & documents) | global": lambda n, device: (
        P.SlidingWindow(512) & P.Documents(cu_seqlens=starts(n, n // 1024, device)) | P.Global(64)
    ),
    "1024 documents": lambda n, device: P.Documents(cu_seqlens=starts(n, n // 1024, device)),
}
DENSE = "dense mask"


def arguments(argv: Sequence[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    names = [*PATTERNS, DENSE]
    parser.add_argument("--n", type=int, default=LENGTH)
    parser.add_argument("--dense-n", type=int, default=DENSE_LENGTH, help="of the mask tensor")
    parser.add_argument("--devices", nargs="*", default=["cpu"], choices=["cuda", "cpu"])
    parser.add_argument("--threads", type=int, default=2, help="of the CPU")
    parser.add_argument("--only", nargs="+", default=names, choices=names)
    parser.add_argument("--ratios", action="store_true", help="visited over allowed pairs, too")
    parser.add_argument("--ratio-n", type=int, default=RATIO_LENGTH)
    parser.add_argument("--seconds", type=float, default=20, help="at most, of one measurement")
    parser.add_argument("--out", help="path of the JSON file")
    return parser.parse_args(argv)


def pattern_row(name: str, n: int, device: str, seconds: float) -> Row:
    """A layout made as if for the first time at this length."""
    pattern = PATTERNS[name](n, device)
    made = functools.partial(layout_of, pattern, n, device)
    began = time.perf_counter()
    layout = made()
    first = (time.perf_counter() - began) * 1e3
    row: Row = {
        "first_ms": first,  # compiles, and reads the mask's formula
        "nnz_blocks": layout.nnz_blocks,
        "nbytes": layout.nbytes,
        "views": len(layout.views),
        "visited_pairs": layout.visited_pairs,
    }
    del layout
    if first > seconds * 1e3:  # one call has to do
        return {"ms": first, **row}
    row["warm_ms"] = wall_ms(made, repeats=10, at_most_s=seconds, device=device)
    row["views_known_ms"] = wall_ms(made, forgetter(views=False), 10, seconds, device)
    return {"ms": wall_ms(made, forgetter(), 10, seconds, device), **row}


def dense_row(n: int, device: str, seconds: float) -> Row:
    """The layout of a bool mask tensor."""
    from sparse_compile.layout.from_dense import dense_layout

    mask = P.SlidingWindow(4095, 0).dense(n, n, device=device)[0, 0]
    made = functools.partial(dense_layout, mask, 64, 64)
    layout = made().layout
    return {
        "ms": wall_ms(made, repeats=10, at_most_s=seconds, device=device),
        "nnz_blocks": layout.nnz_blocks,
        "nbytes": layout.nbytes,
        "mask_bytes": mask.nbytes,
    }


def ratio_row(name: str, n: int) -> Row:
    """Pairs in visited blocks over pairs that the mask allows, for the kernels' blocks."""
    case = CASES[name]
    pattern = case.pattern(n, "cpu")
    spec = spec_of(pattern, n, "cuda")
    tables = pattern.bound().tables("cpu", n, n, 1, 1)
    layout = layout_of_spec(spec, tables, n, 1, "cpu")
    allowed = case.pairs(n) if case.pairs is not None else layout.allowed_pairs
    return {
        "visited_pairs": layout.visited_pairs,
        "allowed_pairs": allowed,
        "ratio": layout.visited_pairs / allowed,
        "views": len(layout.views),
    }


def guarded(make: Callable[[], Row]) -> Row:
    try:
        return make()
    except Exception as error:  # one failure must not end the rest
        return {"error": f"{type(error).__name__}: {error}"[:600]}


def jobs(args: argparse.Namespace) -> list[tuple[Row, Callable[[], Row]]]:
    """What identifies each row, and what makes the rest of it."""
    found: list[tuple[Row, Callable[[], Row]]] = []
    if args.ratios:
        n = args.ratio_n
        found += [
            ({"ratio_of": name, "n": n}, functools.partial(ratio_row, name, n)) for name in CASES
        ]
    for name in args.only:
        for device in args.devices:
            n = args.dense_n if name == DENSE else args.n
            make = (
                functools.partial(dense_row, n, device, args.seconds)
                if name == DENSE
                else functools.partial(pattern_row, name, n, device, args.seconds)
            )
            found.append(({"layout_of": name, "n": n, "device": device}, make))
    return found


def main(argv: Sequence[str] | None = None) -> None:
    args = arguments(argv)
    torch.set_num_threads(args.threads)
    rows: list[Row] = []
    for what, make in jobs(args):
        rows.append({**what, **guarded(make)})
        values = rows[-1].items()
        shown = (f"{k} {v:.4g}" if isinstance(v, float) else f"{k} {v}" for k, v in values)
        print(", ".join(shown), flush=True)
        if args.out:
            write_json(args.out, rows)


if __name__ == "__main__":
    main()
