"""The features of queries and keys as the tiles that kernels hold: one, or two for wide heads.

A tile has a power of two of columns. Heads of more than 256 features that are no such power, as the
576 of a latent key in DeepSeek-V3, are cut in the largest power of two that fits and the rest.
"""

from __future__ import annotations

from dataclasses import dataclass

from sparse_compile.codegen.runtime.generated import fill
from sparse_compile.codegen.triton.tile import padded

#: Up to here a head is one tile, whatever its dimension.
WIDE = 256


@dataclass(frozen=True)
class Features:
    """Columns ``first, ..., first + dim - 1`` of queries and keys.

    Attributes:
        suffix: of the names of its tiles.
    """

    suffix: str
    first: int
    dim: int

    @property
    def pad(self) -> int:
        """Columns of its tiles."""
        return padded(self.dim)

    def of(self, pointer: str) -> str:
        """A pointer to its first column."""
        return f"{pointer} + {self.first}" if self.first else pointer


def features_of(head_dim: int) -> tuple[Features, ...]:
    """The tiles of a head.

    >>> [(part.dim, part.pad) for part in features_of(576)]
    [(512, 512), (64, 64)]
    >>> [(part.dim, part.pad) for part in features_of(192)]
    [(192, 256)]
    """
    main = 1 << (head_dim.bit_length() - 1)
    if head_dim <= WIDE or head_dim == main:
        return (Features("", 0, head_dim),)
    return Features("", 0, main), Features("_rest", main, head_dim - main)


_QUERY = (
    "query$X = rows_of($BASE, h, token, q_stride_h, q_stride_n, exist, $DIM, $PAD)",
    "key$X = keys_of($BASE, kv, k_stride_n, there, $DIM, $PAD)",
)


def _each(parts: tuple[Features, ...], template: str, pointer: str = "") -> list[str]:
    """The template once for each part."""
    single = len(parts) == 1
    lines: list[str] = []
    for part in parts:
        sizes = ("HEAD_DIM", "HEAD_PAD") if single else (str(part.dim), str(part.pad))
        holes = {"X": part.suffix, "BASE": part.of(pointer), "DIM": sizes[0], "PAD": sizes[1]}
        lines += fill(template, **holes).splitlines()
    return lines


def queries(parts: tuple[Features, ...]) -> list[str]:
    """Lines that load the queries."""
    return _each(parts, _QUERY[0], "Q")


def operands(
    parts: tuple[Features, ...], shared: bool, described: bool, precision: str
) -> list[str]:
    """Lines that load keys and values, and multiply queries and keys.

    Args:
        parts: of a head.
        shared: whether the values are the first features of the keys.
        described: whether K and V are tensor descriptors; then a head is one part.
        precision: what a product is told.
    """
    if described:
        return [
            "key = K.load([b, key_head, first, 0]).reshape(TILE_N, HEAD_PAD)",
            "value = V.load([b, key_head, first, 0]).reshape(TILE_N, VALUE_PAD)",
            f"score = tl.dot(query, key.T{precision})",
        ]
    value = "value = keys_of(V, kv, v_stride_n, there, VALUE_DIM, VALUE_PAD)"
    lines = _each(parts, _QUERY[1], "K")
    lines.append("value = key  # V is the first features of K" if shared else value)
    lines.append(f"score = tl.dot(query, key.T{precision})")
    if len(parts) > 1:
        lines.append(f"score = tl.dot(query_rest, key_rest.T, score{precision})")
    return lines


def no_grad_q(parts: tuple[Features, ...]) -> list[str]:
    """Lines that start the gradient of the queries."""
    return _each(parts, "grad_q$X = tl.zeros([TILE_M, $PAD], tl.float32)")


def grad_q(parts: tuple[Features, ...], precision: str) -> list[str]:
    """Lines that add to the gradient of the queries."""
    return _each(parts, f"grad_q$X = tl.dot(grad_score, key$X, grad_q$X{precision})")


def store_grad_q(parts: tuple[Features, ...]) -> list[str]:
    """Lines that store the gradient of the queries."""
    to = "heads, token, n_q * HEAD_DIM, HEAD_DIM, exist"
    return _each(parts, f"store_rows($BASE, grad_q$X * scale, {to}, $DIM)", "GRAD_Q")


def add_grad_k(parts: tuple[Features, ...], precision: str) -> list[str]:
    """Lines that add the gradient of the keys of a tile to what other programs found."""
    template = f"""\
grad_k = tl.dot(grad_score.T, query$X{precision}) * scale
column = tl.arange(0, $PAD)[None, :]
tl.atomic_add(
    $BASE + owner * HEAD_DIM + column, grad_k, mask=there[:, None] & (column < $DIM)
)
"""
    return _each(parts, template, "GRAD_K")
