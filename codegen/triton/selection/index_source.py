"""From an IndexSpec to the text of a Triton module that scores: same spec, same bytes."""

from __future__ import annotations

from dataclasses import dataclass

from sparse_compile.codegen.entry import Entry, Kernel, integers, number, pointers, sizes, strides
from sparse_compile.codegen.triton.filled import filled
from sparse_compile.codegen.triton.layout.key import Key, digest
from sparse_compile.codegen.triton.selection import text
from sparse_compile.codegen.triton.selection.source import verdict_lines, verdict_source
from sparse_compile.codegen.triton.tile import padded, power_of_two


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
        *strides("q"),
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
        VERDICT=verdict_lines(key, "base // TILE_Q", "tile_kv") if spec.masked else ["may = True"],
        KEY="key.to(tl.float32)" if single else "key",
        QUERY="query.to(tl.float32)" if single else "query",
        PRECISION=', input_precision="ieee"' if single else "",
    )
    helpers = ["\n\n", *verdict_source(key)] if spec.masked else ["\n\n"]
    return Kernel(spec.name, "".join([header, *helpers, kernel]), (entry,))
