"""From a SelectedKernelSpec to the source text of its kernels: same spec, same bytes."""

from __future__ import annotations

from sparse_compile.codegen.entry import Entry, Kernel
from sparse_compile.codegen.runtime.generated import fill
from sparse_compile.codegen.triton.filled import head, precision
from sparse_compile.codegen.triton.layout.key import Key, constant_sizes
from sparse_compile.codegen.triton.layout.source import verdict_text
from sparse_compile.codegen.triton.layout.text import BOUNDS
from sparse_compile.codegen.triton.predicate import helpers_in
from sparse_compile.codegen.triton.score import Scoring
from sparse_compile.codegen.triton.selected import latent, text, text_by_key, text_union
from sparse_compile.codegen.triton.selected.entries import entries_of
from sparse_compile.codegen.triton.selected.spec import SelectedKernelSpec, features_of
from sparse_compile.codegen.triton.selected.tiles import tiles_for
from sparse_compile.codegen.triton.selected.united import neighbours
from sparse_compile.codegen.triton.tile import Tile
from sparse_compile.expr import B, H, MaskExpr
from sparse_compile.spec.view import natural

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
    can_skip = _can_skip(attention.mask) and not spec.adds_by_query
    verdict = _verdict(attention.mask) if can_skip else []
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
    score, parts = scoring.score, _of_parts(spec)
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
        QUERY=parts["QUERY"],
        KEY_HEAD=key_head.splitlines(),
        FACTOR=score.factor,
        **shape,
    )
    add_grads = fill(text.ADD_GRADS, PRECISION=told, **parts) if spec.adds_by_query else ""
    return entry.text(
        _BY_QUERY[entry.name],
        UNIT=unit.splitlines(),
        NEIGHBOURS=shape["NEIGHBOURS"],
        DESCRIBED=[_DESCRIBED] if tile.descriptors else [],
        OPERANDS=_operands(spec, tile.descriptors, parts["KEY"]),
        BEFORE=[_AT_ROWS, *scoring.before] if scoring.reads_places else [],
        SLOPE=" * slope" if score.is_given else "",
        FIRST_KEYS=first_keys,
        KEYS=keys,
        MASK=mask,
        PRECISION=told,
        GRADS_OF_KEYS=_GRADS[spec.adds_by_query],
        ADD_GRADS=add_grads.splitlines(),
        **parts,
    )


def _of_parts(spec: SelectedKernelSpec) -> dict[str, list[str]]:
    """Lines for all parts of a head, by the names of holes."""
    parts = features_of(spec.head_dim)
    found: dict[str, list[str]] = {}
    for name, (pointer, template) in text.OF_PARTS.items():
        found[name] = []
        for part in parts:
            columns = {"DIM": "HEAD_DIM", "PAD": "HEAD_PAD"}
            if len(parts) > 1:
                columns = {"DIM": str(part.dim), "PAD": str(part.pad)}
            holes = {"X": part.suffix, "BASE": part.of(pointer), **columns}
            found[name] += fill(template, PRECISION=precision(spec), **holes).splitlines()
    return found


def _operands(spec: SelectedKernelSpec, described: bool, keys: list[str]) -> list[str]:
    """Lines that load keys and values, and multiply queries and keys.

    Args:
        spec: of the kernels.
        described: whether K and V are tensor descriptors; then a head is one part.
        keys: those that load keys otherwise.
    """
    told = precision(spec)
    score = f"score = tl.dot(query, key.T{told})"
    if described:
        return [
            "key = K.load([b, key_head, first, 0]).reshape(TILE_N, HEAD_PAD)",
            "value = V.load([b, key_head, first, 0]).reshape(TILE_N, VALUE_PAD)",
            score,
        ]
    value = "value = keys_of(V, kv, v_stride_n, there, VALUE_DIM, VALUE_PAD)"
    shared = "value = key  # V is the first features of K"
    lines = [*keys, shared if spec.shared else value, score]
    if len(features_of(spec.head_dim)) > 1:
        lines.append(f"score = tl.dot(query_rest, key_rest.T, score{told})")
    return lines


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
    can_skip = not transposed and _can_skip(spec.attention.mask)
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
        PARTLY=_partly(spec.attention.mask) if can_skip else [],
        ENTRIES=text_by_key.ENTRIES.splitlines(),
        MASK=[*at_rows, *lines, *masking],
        SLOPE=score.apply_slope,
        PRECISION=precision(spec),
    )


def _can_skip(mask: MaskExpr) -> bool:
    """Whether a kernel can bound a mask, as it reads no table and is the same for all heads.

    Where the mask allows all pairs of an item of work, it need not be evaluated. An item is a unit
    of keys and entries that name it, in the order of their queries, so its first and last entry
    bound the queries. What must hold between bounds follows from interval analysis.
    """
    varies = mask.tables or mask.depends_on(B) or mask.depends_on(H)
    return not varies and not constant_sizes(mask.text)


def _key(mask: MaskExpr) -> Key:
    return Key(mask.text, natural(1), natural(1), (None,) * mask.n_sizes)


def _verdict(mask: MaskExpr) -> list[str]:
    """The functions that :func:`_partly` needs besides those that predicates are printed with."""
    verdict = verdict_text(_key(mask)).strip() + "\n"
    return [BOUNDS, verdict] if "LEAST" in verdict or "GREATEST" in verdict else [verdict]


def _partly(mask: MaskExpr) -> list[str]:
    """Lines that say whether an item holds pairs that the mask hides."""
    sizes = ", ".join(["", *_key(mask).sizes])
    return text_by_key.PARTLY.replace("$SIZES", sizes).splitlines()
