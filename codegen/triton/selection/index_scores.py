"""The kernel that scores tokens as a lightning indexer does: its text, and its launch."""

from __future__ import annotations

import functools
from dataclasses import dataclass

import torch
from torch import Tensor

from sparse_compile.codegen.entry import Entry, Kernel, integers, number, pointers, sizes
from sparse_compile.codegen.entry import strides as strides_of
from sparse_compile.codegen.runtime.launch import DTYPE_NAMES, strides
from sparse_compile.codegen.triton.filled import filled
from sparse_compile.codegen.triton.layout.key import Key, digest
from sparse_compile.codegen.triton.selection import printable, text
from sparse_compile.codegen.triton.tile import padded, power_of_two
from sparse_compile.selection.builders import Indexing, IndexScores
from sparse_compile.spec.target import Target

#: What the kernel holds of a key, and of the heads' products in half and in single precision.
_MOST_DIM, _MOST_HEADS, _MOST_HEADS_SINGLE = 256, 128, 32


@dataclass(frozen=True)
class IndexSpec:
    """What a module is generated for; hashable.

    Attributes:
        key: the mask, in tiles of queries and of keys.
        masked: whether tiles that it hides are left out; else all are computed.
        heads, dim: of the indexer.
        dtype: of its queries and keys, "float32", "float16" or "bfloat16".
        arch: "sm_90" and the like, or "interpreter".
    """

    key: Key
    masked: bool
    heads: int
    dim: int
    dtype: str
    arch: str

    @property
    def name(self) -> str:
        """What the module is called."""
        shape = (self.masked, self.heads, self.dim, self.dtype, self.arch)
        return f"index_scores_{digest(repr((*self.key.identity, shape)))}"

    @property
    def heads_pad(self) -> int:
        """A power of two."""
        return power_of_two(self.heads)

    @property
    def dim_pad(self) -> int:
        """A power of two."""
        return padded(self.dim)

    @property
    def tokens(self) -> int:
        """Queries of one product, which then has so many columns, or those of one query."""
        wide = 32 if self.dtype == "float32" else 128 if self.arch == "sm_90" else 64
        return max(1, wide // self.heads_pad)

    @property
    def options(self) -> dict[str, int]:
        """What the compiler is told."""
        single = self.dtype == "float32"
        return {"num_warps": 4 if single else 8, "num_stages": 1 if single else 2}


def tiles(dtype: str) -> tuple[int, int]:
    """Queries, and keys, of a tile."""
    return (64, 32) if dtype == "float32" else (64, 128)


def _entry(spec: IndexSpec) -> Entry:
    lines = (
        pointers(spec.dtype, "Q", "K", "W") + pointers("float32", "SCORES"),
        *strides_of("q"),
        integers("k_stride_b", "k_stride_n"),
        integers("w_stride_b", "w_stride_n", "w_stride_h", assumed=None),
        sizes("first", "end") + number("factor") + sizes("n_q", "n_kv"),
        sizes(*(spec.key.sizes if spec.masked else [])),
    )
    return Entry("index_scores", lines, spec.options)


def index_kernel(spec: IndexSpec) -> Kernel:
    """The module of a spec: the kernel ``index_scores``."""
    key, entry = spec.key, _entry(spec)
    header = filled(
        text.INDEX_MODULE,
        spec,
        MASK=str(key.mask) if spec.masked else "left to who reads the scores",
        TILE_Q=str(key.q.block),
        TILE_KV=str(key.kv.block),
    )
    single = spec.arch == "interpreter" or spec.dtype == "float32"
    kernel = entry.text(
        text.INDEX_SCORES,
        VERDICT=printable.verdict_lines(key, "base // TILE_Q", "tile_kv")
        if spec.masked
        else ["may = True"],
        KEY="key.to(tl.float32)" if single else "key",
        QUERY="query.to(tl.float32)" if single else "query",
        PRECISION=', input_precision="ieee"' if single else "",
    )
    helpers = ["\n\n", *printable.verdict_source(key)] if spec.masked else ["\n\n"]
    return Kernel(spec.name, "".join([header, *helpers, kernel]), (entry,))


def index_scores(of: Indexing, first: int, end: int) -> Tensor:
    """The scores of the queries ``first, ..., end - 1``: fp32 [B, end - first, Nkv]."""
    q, k, w, visible = of.q, of.k, of.w, of.visible
    (batch, heads, n_q, dim), n_kv = q.shape, k.shape[1]
    q, k = (t if t.stride(-1) == 1 else t.contiguous() for t in (q, k))
    dtype = DTYPE_NAMES[q.dtype]
    run_q, run_kv = tiles(dtype)
    key = printable.key_of(visible, run_q, run_kv)
    # A tile that is left out must not hold a part of a run that is visible.
    whole = first % run_q == run_q % visible.run_q == run_kv % visible.run_kv == 0
    masked = whole and visible.printable
    spec = IndexSpec(key, masked, heads, dim, dtype, Target.of(q.device).arch)
    scores = torch.empty(batch, end - first, n_kv, dtype=torch.float32, device=q.device)
    w_steps = {f"w_stride_{axis}": step for axis, step in zip("bnh", w.stride(), strict=True)}
    values = {"Q": q, "K": k, "W": w, "SCORES": scores, **strides(q=q), **w_steps}
    values |= {"k_stride_b": k.stride(0), "k_stride_n": k.stride(1)}
    values |= {"first": first, "end": end, "factor": of.factor, "n_q": n_q, "n_kv": n_kv}
    values |= key.values(visible.sizes) if masked else {}
    grid = -(-n_kv // run_kv), -(-(end - first) // run_q), batch
    printable.launch(index_kernel, spec, q.device, grid, values)
    return scores


def scorer(of: Indexing) -> IndexScores | None:
    """:func:`index_scores` of these queries and keys; None where their sizes or dtypes are others.

    What it gives takes the first of some queries, and their end.
    """
    q, k, heads, dim = of.q, of.k, of.q.shape[1], of.q.shape[3]
    most = _MOST_HEADS_SINGLE if q.dtype == torch.float32 else _MOST_HEADS
    fits = heads <= most and dim <= _MOST_DIM and min(q.numel(), k.numel()) > 0
    fits = fits and q.dtype == k.dtype and q.dtype in DTYPE_NAMES
    return functools.partial(index_scores, of) if fits else None
