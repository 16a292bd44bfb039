"""From a SelectedKernelSpec to the source text of its kernels: same spec, same bytes."""

from __future__ import annotations

from sparse_compile.codegen.entry import Entry, Kernel
from sparse_compile.codegen.runtime.generated import fill
from sparse_compile.codegen.triton.filled import head, precision
from sparse_compile.codegen.triton.predicate import helpers_in
from sparse_compile.codegen.triton.score import Scoring
from sparse_compile.codegen.triton.selected import (
    features,
    latent,
    text,
    text_by_key,
    text_union,
    whole_items,
)
from sparse_compile.codegen.triton.selected.entries import entries_of
from sparse_compile.codegen.triton.selected.features import features_of
from sparse_compile.codegen.triton.selected.spec import SelectedKernelSpec
from sparse_compile.codegen.triton.selected.tiles import tiles_for
from sparse_compile.codegen.triton.selected.united import neighbours
from sparse_compile.codegen.triton.tile import Tile
from sparse_compile.expr import H

_BY_QUERY = {
    "forward": text.FORWARD,
    "backward_query": text.BACKWARD_QUERY,
    "forward_union": text_union.FORWARD_UNION,
}
_BY_KEY = {
    "forward_by_key": text_by_key.FORWARD_BY_KEY,
    "backward_key_value": text_by_key.BACKWARD_KEY_VALUE,
}


def selected_kernel(spec: SelectedKernelSpec) -> Kernel:
    """The module of a spec: ``forward``, ``merge``, ``backward_query``, by key and by union."""
    tiles, attention = tiles_for(spec), spec.attention
    entries = entries_of(spec, tiles)
    scorings = {axis: Scoring.of(attention, attention.mask, axis) for axis in ("kv", "q")}
    can_skip = whole_items.can_print(attention.mask) and not spec.adds_by_query
    verdict = whole_items.functions(attention.mask) if can_skip else []
    helpers = scorings["kv"].helpers | scorings["q"].helpers | helpers_in(*verdict)
    parts = head(
        text.HEADER,
        spec,
        scorings["kv"].score,
        helpers,
        UNIT_Q=str(attention.unit_q),
        UNIT_KV=str(attention.unit_kv),
    )
    for entry in entries:
        if entry.name == "merge":
            parts.append(entry.text(text.MERGE, TILE_M=str(tiles.forward.m)))
        elif entry.name in _BY_KEY:
            parts += verdict if entry.name == "forward_by_key" else []
            parts.append(_by_key(entry, spec, scorings["q"]))
        else:
            parts.append(_by_query(entry, spec, scorings["kv"]))
    beside = (latent.latent_kernel(spec),) if latent.can_be_latent(spec) else ()
    return Kernel(spec.name, "\n\n".join(parts), entries, beside=beside)


def _by_query(entry: Entry, spec: SelectedKernelSpec, scoring: Scoring) -> str:
    """A kernel whose programs hold rows and loop over selected keys."""
    tile: Tile = entry.tile
    score, parts = scoring.score, features_of(spec.head_dim)
    united, is_backward = entry.name == "forward_union", entry.name == "backward_query"
    kept = ["there[None, :]", "named"] if united else ["there[None, :]"]
    mask = [
        *(["kv = tl.minimum(kv, n_kv - 1)[None, :]"] if scoring.reads_places else []),
        *(score.slope if is_backward else score.value),
        *scoring.mask.masking(*kept),
    ]
    told = precision(spec)
    key_head = text.DESCRIBED_KEY_HEAD if tile.descriptors else text.KEY_HEAD
    yields = not united and "BALANCE" in entry.names
    first_keys, keys = _keys(tile.n <= spec.attention.unit_kv, united)
    shape = {"TILE_M": str(tile.m), "TILE_N": str(tile.n), "NEIGHBOURS": str(neighbours(spec))}
    unit = fill(
        text_union.UNIT if united else text.UNIT,
        YIELD=text_union.YIELD.splitlines() if yields else [],
        QUERY=features.queries(parts),
        KEY_HEAD=key_head.splitlines(),
        FACTOR=score.factor,
        **shape,
    )
    return entry.text(
        _BY_QUERY[entry.name],
        UNIT=unit.splitlines(),
        NEIGHBOURS=shape["NEIGHBOURS"],
        DESCRIBED=[_DESCRIBED] if tile.descriptors else [],
        OPERANDS=features.operands(parts, spec.shared, tile.descriptors, told),
        NO_GRAD_Q=features.no_grad_q(parts),
        GRAD_Q=features.grad_q(parts, told),
        STORE_GRAD_Q=features.store_grad_q(parts),
        BEFORE=[_AT_ROWS, *scoring.before] if scoring.reads_places else [],
        SLOPE=" * slope" if score.is_given else "",
        FIRST_KEYS=first_keys,
        KEYS=keys,
        MASK=mask,
        PRECISION=told,
        GRADS_OF_KEYS=_GRADS[spec.adds_by_query],
        ADD_GRADS=_add_grads(spec, told) if spec.adds_by_query else [],
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


def _add_grads(spec: SelectedKernelSpec, told: str) -> list[str]:
    grad_k = features.add_grad_k(features_of(spec.head_dim), told)
    return fill(text.ADD_GRADS, PRECISION=told, ADD_GRAD_K=grad_k).splitlines()


_AT_ROWS = "q, h = tl.minimum(token, n_q - 1)[:, None], h[:, None]"
_GRADS = {
    False: "Those of keys and values are left to backward_key_value.",
    True: "Adds to GRAD_K and GRAD_V, fp32.",
}


def _by_key(entry: Entry, spec: SelectedKernelSpec, scoring: Scoring) -> str:
    """A kernel whose programs hold a unit of keys and loop over the queries that selected it."""
    tile: Tile = entry.tile
    transposed = entry.name == "backward_key_value"
    score, mask, placed = scoring.score, scoring.mask, scoring.reads_places
    along, across = ("[None, :]", "[:, None]") if transposed else ("[:, None]", "[None, :]")
    # Heads vary along the loop here, which the printer does not know.
    program = spec.attention.score
    by_head = spec.attention.mask.depends_on(H) or (program is not None and program.depends_on(H))
    masking = [*(mask.before if by_head else ()), *mask.masking(f"there{across}")]
    # In the backward the branch costs more than the mask does.
    can_skip = not transposed and whole_items.can_print(spec.attention.mask)
    if can_skip:
        masking = ["if partly:", *(f"    {line}" for line in masking)]
    at_rows = [f"q, h = tl.minimum(token, n_q - 1){along}, h{along}"] if placed else []
    lines = [*(score.before if by_head else ()), *(score.slope if transposed else score.value)]
    outside = [f"kv = tl.minimum(kv, n_kv - 1){across}", *([] if by_head else scoring.before)]
    start = fill(text_by_key.KEYS, TILE_M=str(tile.m), TILE_N=str(tile.n), FACTOR=score.factor)
    return entry.text(
        _BY_KEY[entry.name],
        START=start.splitlines(),
        BEFORE=outside if placed else [],
        PARTLY=whole_items.lines(spec.attention.mask) if can_skip else [],
        ENTRIES=text_by_key.ENTRIES.splitlines(),
        MASK=[*at_rows, *lines, *masking],
        SLOPE=score.apply_slope,
        PRECISION=precision(spec),
    )
