"""From a SelectedKernelSpec to the source text of its kernels: same spec, same bytes."""

from __future__ import annotations

import functools
import hashlib
import json
from dataclasses import dataclass

from sparse_compile.codegen.entry import Entry, Kernel
from sparse_compile.codegen.runtime.generated import fill
from sparse_compile.codegen.triton.blocks.source import escaped, legend
from sparse_compile.codegen.triton.blocks.tiles import padded
from sparse_compile.codegen.triton.predicate import Printed, print_predicate
from sparse_compile.codegen.triton.score import PrintedScore, print_score
from sparse_compile.codegen.triton.selected import (
    features,
    latent,
    text,
    text_by_key,
    text_union,
    whole_items,
)
from sparse_compile.codegen.triton.selected.entries import entries_of
from sparse_compile.codegen.triton.selected.features import WIDE, features_of
from sparse_compile.codegen.triton.selected.tiles import Tile, tiles_for
from sparse_compile.codegen.triton.selected.united import neighbours
from sparse_compile.codegen.triton.text import common
from sparse_compile.expr import H
from sparse_compile.spec import AttentionSpec


@dataclass(frozen=True)
class SelectedKernelSpec:
    """Everything that determines the source of the kernels. It *is* the cache key.

    Attributes:
        selected: the mask; one part of units covers it.
        head_dim, value_dim, dtype, arch: as in :class:`sparse_compile.spec.KernelSpec`.
        members: query heads that share a key head and a selection.
        shared: whether the values are the first features of the keys, in the same memory.
    """

    selected: AttentionSpec
    head_dim: int
    value_dim: int
    dtype: str
    arch: str
    members: int
    shared: bool = False

    @functools.cached_property
    def name(self) -> str:
        """A readable unique name for its file."""
        short = {"float32": "f32", "float16": "f16", "bfloat16": "bf16"}[self.dtype]
        shape = [self.head_dim, self.value_dim, self.dtype, self.arch, self.members, self.shared]
        identity = json.dumps([self.selected.text, *shape])
        digest = hashlib.sha256(identity.encode()).hexdigest()[:8]
        return f"selected_d{self.head_dim}_{short}_{digest}"

    @property
    def rows(self) -> int:
        """Rows of an entry: queries of a unit, for all members."""
        return self.members * self.selected.unit_q

    @property
    def adds_by_query(self) -> bool:
        """Whether programs of queries add to the gradients of keys.

        They do where units are too short, or heads too wide, for programs that hold keys.
        """
        return self.selected.unit_kv < 16 or max(self.head_dim, self.value_dim) > WIDE


def selected_kernel(spec: SelectedKernelSpec) -> Kernel:
    """The module of a spec: ``forward``, ``merge``, ``backward_query``, by key and by union."""
    tiles = tiles_for(spec)
    entries = entries_of(spec, tiles)
    entry = {one.name: one for one in entries}
    mask = spec.selected.mask
    printed = [print_predicate(mask, axis) for axis in ("kv", "q")]
    can_skip = whole_items.can_print(mask) and not spec.adds_by_query
    scores = [_score(spec, axis, one) for axis, one in zip(("kv", "q"), printed, strict=True)]
    helpers = set().union(*(one.helpers for one in printed), *(one.helpers for one in scores))
    helpers |= whole_items.helpers(mask) if can_skip else set()
    parts = [
        _header(spec, scores[0]),
        *(common.HELPERS[name] for name in sorted(helpers)),
        _by_query(text.FORWARD, entry["forward"], spec),
        entry["merge"].text(text.MERGE, TILE_M=str(tiles.forward.m)),
        _by_query(text.BACKWARD_QUERY, entry["backward_query"], spec),
    ]
    if not spec.adds_by_query:
        if can_skip:
            parts += whole_items.functions(mask)
        parts.append(_by_key(text_by_key.FORWARD_BY_KEY, entry["forward_by_key"], spec))
        parts.append(_by_key(text_by_key.BACKWARD_KEY_VALUE, entry["backward_key_value"], spec))
    if "forward_union" in entry:
        parts.append(_by_query(text_union.FORWARD_UNION, entry["forward_union"], spec))
    beside = (latent.latent_kernel(spec),) if latent.can_be_latent(spec) else ()
    return Kernel(spec.name, "\n\n".join(parts), entries, beside=beside)


def selected_source(spec: SelectedKernelSpec) -> str:
    """The text of :func:`selected_kernel`."""
    return selected_kernel(spec).source


def _score(spec: SelectedKernelSpec, loop_axis: str, mask: Printed) -> PrintedScore:
    return print_score(spec.selected.score, spec.selected.mask.tables, loop_axis, mask)


def _header(spec: SelectedKernelSpec, score: PrintedScore) -> str:
    where = [f"at       {line}" for line in spec.selected.where]
    return fill(
        text.HEADER,
        NAME=spec.name,
        ARCH=spec.arch,
        PROGRAM=[escaped(line) for line in score.shown],
        MASK=escaped(str(spec.selected.mask)),
        WHERE=[*map(escaped, where), ""],
        SYMBOLS=legend(spec.selected.mask),
        UNIT_Q=str(spec.selected.unit_q),
        UNIT_KV=str(spec.selected.unit_kv),
        MEMBERS=str(spec.members),
        HEAD_DIM=str(spec.head_dim),
        HEAD_PAD=str(padded(spec.head_dim)),
        VALUE_DIM=str(spec.value_dim),
        VALUE_PAD=str(padded(spec.value_dim)),
        LOADED="tile.to(tl.float32)  # the interpreter cannot multiply bfloat16"
        if spec.arch == "interpreter"
        else "tile",
    )


def _by_query(template: str, entry: Entry, spec: SelectedKernelSpec) -> str:
    """A kernel whose programs hold rows and loop over selected keys."""
    tile: Tile = entry.tile
    printed = print_predicate(spec.selected.mask, "kv")
    score = _score(spec, "kv", printed)
    keep = [f"keep = {printed.keep}"] if printed.keep else []
    kept = "keep & there[None, :]" if printed.keep else "there[None, :]"
    united = template is text_union.FORWARD_UNION
    kept = f"{kept} & named" if united else kept
    placed = bool(keep) or score.reads_places
    mask = [
        *(["kv = tl.minimum(kv, n_kv - 1)[None, :]"] if placed else []),
        *(score.value if template in (text.FORWARD, text_union.FORWARD_UNION) else score.slope),
        *printed.inside,
        *keep,
        f'score = tl.where({kept}, score, float("-inf"))',
    ]
    whole = tile.n <= spec.selected.unit_kv
    precision = _precision(spec)
    parts = features_of(spec.head_dim)
    key_head = text.DESCRIBED_KEY_HEAD if tile.descriptors else text.KEY_HEAD
    shape = {"TILE_M": str(tile.m), "TILE_N": str(tile.n), "NEIGHBOURS": str(neighbours(spec))}
    yields = not united and "BALANCE" in entry.names
    first_keys, keys = _keys(whole, united)
    return entry.text(
        template,
        UNIT=fill(
            text_union.UNIT if united else text.UNIT,
            YIELD=text_union.YIELD.splitlines() if yields else [],
            QUERY=features.queries(parts),
            KEY_HEAD=key_head.splitlines(),
            FACTOR=score.factor,
            **shape,
        ).splitlines(),
        NEIGHBOURS=str(neighbours(spec)),
        DESCRIBED=[_DESCRIBED] if tile.descriptors else [],
        OPERANDS=features.operands(parts, spec.shared, tile.descriptors, precision),
        NO_GRAD_Q=features.no_grad_q(parts),
        GRAD_Q=features.grad_q(parts, precision),
        STORE_GRAD_Q=features.store_grad_q(parts),
        BEFORE=[_AT_ROWS, *printed.before, *score.before] if placed else [],
        SLOPE=" * slope" if score.is_given else "",
        FIRST_KEYS=first_keys,
        KEYS=keys,
        MASK=mask,
        PRECISION=precision,
        GRADS_OF_KEYS=_GRADS[spec.adds_by_query],
        ADD_GRADS=_add_grads(spec, precision) if spec.adds_by_query else [],
    )


def _keys(whole: bool, united: bool) -> tuple[list[str], list[str]]:
    """Lines that place the keys of a tile: before the loop, and in it."""
    first = (text.FIRST_WHOLE if whole else text.FIRST_GATHERED).splitlines()
    keys = (text.WHOLE if whole else text.GATHERED).splitlines()
    if not united:
        return first, keys
    if whole:
        names = text_union.FIRST_WHOLE, text_union.NAMED_WHOLE, text_union.NEXT_WHOLE
    else:
        names = text_union.FIRST_GATHERED, text_union.NAMED_GATHERED, text_union.NEXT_GATHERED
    return [*first, names[0]], [names[1], *keys, names[2]]


_DESCRIBED = "K and V are tensor descriptors of tiles, of TILE_N tokens and all features."


def _add_grads(spec: SelectedKernelSpec, precision: str) -> list[str]:
    grad_k = features.add_grad_k(features_of(spec.head_dim), precision)
    return fill(text.ADD_GRADS, PRECISION=precision, ADD_GRAD_K=grad_k).splitlines()


_AT_ROWS = "q, h = tl.minimum(token, n_q - 1)[:, None], h[:, None]"
_GRADS = {
    False: "Those of keys and values are left to backward_key_value.",
    True: "Adds to GRAD_K and GRAD_V, fp32.",
}


def _by_key(template: str, entry: Entry, spec: SelectedKernelSpec) -> str:
    """A kernel whose programs hold a unit of keys and loop over the queries that selected it."""
    tile: Tile = entry.tile
    transposed = template is text_by_key.BACKWARD_KEY_VALUE
    printed = print_predicate(spec.selected.mask, "q")
    score = _score(spec, "q", printed)
    along, across = ("[None, :]", "[:, None]") if transposed else ("[:, None]", "[None, :]")
    # Heads vary along the loop here, which the printer does not know.
    program = spec.selected.score
    by_head = spec.selected.mask.depends_on(H) or (program is not None and program.depends_on(H))
    before = [f"kv = tl.minimum(kv, n_kv - 1){across}"]
    placed = bool(printed.keep) or score.reads_places
    keep: list[str] = []
    if printed.keep:
        keep = [*(printed.before if by_head else ()), *printed.inside, f"keep = {printed.keep}"]
    kept = f"keep & there{across}" if printed.keep else f"there{across}"
    mask = [*keep, f'score = tl.where({kept}, score, float("-inf"))']
    # In the backward the branch costs more than the mask does.
    can_skip = not transposed and whole_items.can_print(spec.selected.mask)
    if can_skip:
        mask = ["if partly:", *(f"    {line}" for line in mask)]
    at_rows = [f"q, h = tl.minimum(token, n_q - 1){along}, h{along}"] if placed else []
    lines = [*(score.before if by_head else ()), *(score.slope if transposed else score.value)]
    outside = [] if by_head else [*printed.before, *score.before]
    return entry.text(
        template,
        START=fill(
            text_by_key.KEYS, TILE_M=str(tile.m), TILE_N=str(tile.n), FACTOR=score.factor
        ).splitlines(),
        BEFORE=[*before, *outside] if placed else [],
        PARTLY=whole_items.lines(spec.selected.mask) if can_skip else [],
        ENTRIES=text_by_key.ENTRIES.splitlines(),
        MASK=[*at_rows, *lines, *mask],
        SLOPE=score.apply_slope,
        PRECISION=_precision(spec),
    )


def _precision(spec: SelectedKernelSpec) -> str:
    return ', input_precision="ieee"' if spec.dtype == "float32" else ""
