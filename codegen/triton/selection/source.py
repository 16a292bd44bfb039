"""From a ChooseSpec to the text of a Triton module that chooses: same spec, same bytes."""

from __future__ import annotations

from dataclasses import dataclass

from sparse_compile.codegen.entry import Entry, Kernel, pointers, sizes
from sparse_compile.codegen.runtime.generated import fill
from sparse_compile.codegen.triton.filled import filled
from sparse_compile.codegen.triton.layout import source as layout_source
from sparse_compile.codegen.triton.layout.key import Key, digest
from sparse_compile.codegen.triton.layout.text import DIVISIONS
from sparse_compile.codegen.triton.selection import text

_LIMITS = {
    "top_k": text.TOP_K,
    "top_ratio": text.TOP_RATIO,
    "top_p": text.TOP_P,
    "scores": fill(text.THRESHOLD, VALUE="score"),
    "softmax": fill(text.THRESHOLD, VALUE="share_of(score, visible)"),
}
#: Blocks whose keys a program can hold.
HELD = 1 << 15


@dataclass(frozen=True)
class ChooseSpec:
    """What a module is generated for; hashable.

    Attributes:
        key: the mask, in units of queries and blocks of keys.
        given: whether what is visible is a tensor; else it follows from the mask.
        rule: "top_k", "top_ratio", "top_p", "scores" or "softmax".
        blocks, room: at least the blocks, and places of a list; powers of two.
        few: whether there are so few lists that each may take more warps.
    """

    key: Key
    given: bool
    rule: str
    blocks: int
    room: int
    few: bool = False

    @property
    def name(self) -> str:
        """What the module is called."""
        shape = (self.given, self.rule, self.blocks, self.room, self.few)
        return f"choose_{self.rule}_{digest(repr(self.key.identity) + repr(shape))}"

    @property
    def is_long(self) -> bool:
        """Whether a program cannot hold all keys: it reads them again for each bit."""
        return self.blocks > HELD

    @property
    def warps(self) -> int:
        """One for 1024 scores, or 256, up to 32."""
        return 16 if self.is_long else max(1, min(32, self.blocks // (256 if self.few else 1024)))


def _entry(spec: ChooseSpec) -> Entry:
    read = pointers("float32", "SCORES")
    # Without a mask that is given, any tensor stands for it.
    read += pointers("bool" if spec.given else "float64", "VISIBLE") + pointers("float64", "RULE")
    lines = (
        read + pointers("int32", "INDEX", "COUNT"),
        sizes("visible_stride_b", "visible_stride_list", "visible_stride_row"),
        sizes("first", "rows", "units", "lists", "blocks", "room", "sink", "reach", "shift"),
        sizes("n_q", "n_kv"),
        sizes(*([] if spec.given else spec.key.sizes)),
    )
    return Entry("choose", lines, {"num_warps": spec.warps})


def choose_kernel(spec: ChooseSpec) -> Kernel:
    """The module of a spec: the kernel ``choose``."""
    key = spec.key
    header = filled(
        text.MODULE,
        spec,
        MASK="what is visible is given" if spec.given else str(key.mask),
        UNIT_Q=str(key.q.block),
        BLOCK=str(key.kv.block),
        SLICE=str(min(spec.blocks, 512 * spec.warps)),
    )
    names, entry = [] if spec.given else layout_source.data(key), _entry(spec)
    kernel = entry.text(
        text.CHOOSE,
        SIZES=names,
        VISIBLE=text.GIVEN.splitlines() if spec.given else _from_mask(key),
        LIMIT=_LIMITS[spec.rule].splitlines(),
        **_search(spec, names),
    )
    verdict = [DIVISIONS, "\n\n"] if spec.given else verdict_source(key)
    return Kernel(spec.name, "".join([header, *verdict, kernel]), (entry,))


def _search(spec: ChooseSpec, parameters: list[str]) -> dict[str, str | list[str]]:
    """How the least key is searched: among keys that a program holds, or by reading them."""
    arguments = "SCORES, VISIBLE, unit, blocks, sink, near, until, n_q, n_kv"
    names = [] if spec.given else spec.key.sizes

    def found(bound: str) -> str:
        if spec.is_long:
            return f"found_from({', '.join([bound, arguments, *names])})"
        return f"tl.sum((key >= {bound}).to(tl.int32), 0)"

    keys = fill(text.ALL_KEYS, SIZES=parameters).splitlines()
    function = fill(text.FOUND, SIZES=parameters).splitlines()
    return {
        "FOUND": function if spec.is_long else [],
        "ALL_KEYS": [] if spec.is_long else keys,
        "FORCED": found("HIGHEST"),
        "FOUND_POSITIVE": found("limit * 0"),
        "FOUND_HIGHER": found("higher"),
        "FOUND_ABOVE": found("least + 1"),
    }


def verdict_source(key: Key) -> list[str]:
    """The functions ``digits_of_q``, ``digits_of_kv``, ``verdict``, and what they call."""
    sides = layout_source.sides(key)
    return [DIVISIONS, "\n\n", *sides, layout_source.verdict_text(key)]


def verdict_lines(key: Key, q: str, kv: str, runs: tuple[str, str] = ("1", "1")) -> list[str]:
    """Lines that compute ``must`` and ``may``, of the blocks ``q`` and ``kv`` of either side.

    Or of ``runs`` of blocks from those on.
    """
    of_q, of_kv = key.ends("q"), key.ends("kv")
    given = ", ".join([*of_q, *of_kv, "0, 0, 0, 0, n_q, n_kv", *key.sizes])
    return [
        f"{', '.join(of_q)}, q_whole = digits_of_q({q}, n_q, {runs[0]})",
        f"{', '.join(of_kv)}, kv_whole = digits_of_kv({kv}, n_kv, {runs[1]})",
        f"must, may = verdict({given})",
    ]


def _from_mask(key: Key) -> list[str]:
    return [
        *verdict_lines(key, "unit", "block"),
        "visible = tl.where(may, there.to(tl.int32), 0) > 0",
    ]
