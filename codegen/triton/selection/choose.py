"""The kernel that chooses blocks by their scores: its text, from a ChooseSpec, and its launch."""

from __future__ import annotations

import functools
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from sparse_compile.codegen.entry import Entry, Kernel, pointers, sizes
from sparse_compile.codegen.runtime.generated import fill
from sparse_compile.codegen.triton.filled import filled
from sparse_compile.codegen.triton.layout.key import LONGEST, Key, digest
from sparse_compile.codegen.triton.layout.source import data
from sparse_compile.codegen.triton.layout.text import DIVISIONS
from sparse_compile.codegen.triton.selection import printable, text
from sparse_compile.codegen.triton.tile import power_of_two
from sparse_compile.patterns.checks import UPPER_LEFT
from sparse_compile.patterns.scored import Threshold, TopK, TopP, TopRatio, exact
from sparse_compile.selection.builders import Prepared

_LIMITS = {
    "top_k": text.TOP_K,
    "top_ratio": text.TOP_RATIO,
    "top_p": text.TOP_P,
    "scores": fill(text.THRESHOLD, VALUE="score"),
    "softmax": fill(text.THRESHOLD, VALUE="share_of(score, visible)"),
}
#: Blocks whose keys a program can hold.
HELD = 1 << 15
#: Blocks that a row may have for the rule that needs nothing but the order of scores.
_MOST_IN_ORDER = 1 << 20
#: Lists that do not fill a GPU.
_FEW = 256


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
    names, entry = [] if spec.given else data(key), _entry(spec)
    visible = [
        *printable.verdict_lines(key, "unit", "block"),
        "visible = tl.where(may, there.to(tl.int32), 0) > 0",
    ]
    kernel = entry.text(
        text.CHOOSE,
        SIZES=names,
        VISIBLE=text.GIVEN.splitlines() if spec.given else visible,
        LIMIT=_LIMITS[spec.rule].splitlines(),
        **_search(spec, names),
    )
    verdict = [DIVISIONS, "\n\n"] if spec.given else printable.verdict_source(key)
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


@dataclass(frozen=True)
class Chooser:
    """Chooses for the units of a task, some at a time; writes the lists of what was prepared."""

    made: Prepared

    @functools.cached_property
    def rule(self) -> tuple[str, Tensor]:
        """The kind of rule, and fp64 [lists, 2]: its parameters."""
        (kind, values), lists = _rule_of(self.made.pattern), self.made.scores.lists
        # Filling waits for nothing, unlike a copy from the host.
        rule = torch.empty(lists, 2, dtype=torch.float64, device=self.made.index.device)
        if len(values) == 1 and kind != "top_ratio":
            return kind, rule.fill_(values[0][0])
        values = values * (lists if len(values) == 1 else 1)
        for row, (first, second) in zip(rule, values, strict=True):
            row[0].fill_(first)
            row[1].fill_(second)
        return kind, rule

    def spec(self, first: int, end: int) -> ChooseSpec:
        """What the kernel for the units ``first, ..., end - 1`` is generated for."""
        pattern, task, visible = self.made.pattern, self.made.task, self.made.task.visible
        given = not visible.printable
        key = printable.key_of(visible, pattern.unit_q, pattern.block_kv)
        batch, lists, _, room = self.made.index.shape
        few = (end - first) * batch * lists <= _FEW
        seen = task.blocks if given else visible.columns(first, end)
        return ChooseSpec(
            key, given, self.rule[0], power_of_two(max(seen, 32)), power_of_two(room), few
        )

    def __call__(self, scores: Tensor, first: int, end: int) -> None:
        """Write the lists of the units ``first, ..., end - 1``, from [B, lists, units, blocks]."""
        made, pattern, task = self.made, self.made.pattern, self.made.task
        visible = task.visible
        spec, rule = self.spec(first, end), self.rule[1]
        batch, lists, units, room = made.index.shape
        # Without a mask that is given, any tensor stands for it.
        seen, steps, named = rule, [0, 0, 0], spec.key.values(visible.sizes)
        if spec.given:
            seen = visible.may(first, end, lists).contiguous()
            steps, named = list(seen.expand(batch, lists, -1, -1).stride()), {}
        shift = 0 if pattern.align == UPPER_LEFT else task.k.shape[2] - task.q.shape[2]
        grid = end - first, batch * lists
        values: dict[str, Any] = {
            "SCORES": scores.contiguous(),
            "VISIBLE": seen,
            "RULE": rule,
            "INDEX": made.index,
            "COUNT": made.count,
            "first": first,
            "rows": end - first,
            "units": units,
            "lists": lists,
            "blocks": task.blocks,
            "room": room,
            "sink": pattern.sink,
            "reach": pattern.reach,
            "shift": shift,
            "n_q": task.q.shape[2],
            "n_kv": task.k.shape[2],
            "visible_stride_b": steps[0],
            "visible_stride_list": steps[1],
            "visible_stride_row": steps[2],
            **named,
        }
        printable.launch(choose_kernel, spec, scores.device, grid, values)


def chooser(made: Prepared) -> Chooser | None:
    """What chooses for a task by the kernel; None where it cannot, from too many blocks."""
    task, most = made.task, _MOST_IN_ORDER if isinstance(made.pattern, TopK) else HELD
    fits = task.blocks <= most and max(task.q.shape[2], task.k.shape[2]) <= LONGEST
    return Chooser(made) if fits and task.rows * task.blocks < 1 << 40 else None


def choose_spec(made: Prepared) -> ChooseSpec:
    """What the kernel is generated for that chooses for the first units of a task."""
    return Chooser(made).spec(*made.chunks(by_kernel=True)[0])


def _rule_of(rule: Any) -> tuple[str, list[tuple[float, float]]]:
    """The kind of a rule, and two numbers for each list, or for all."""
    match rule:
        case TopK():
            return "top_k", [(min(k, _MOST_IN_ORDER), 0) for k in _each(rule.k)]
        case TopRatio():
            return "top_ratio", [exact(ratio) for ratio in _each(rule.ratio)]
        case TopP():
            # Where all is wanted, a sum that rounding makes too large must not leave out the last.
            return "top_p", [(float("inf") if p == 1 else p, 0) for p in _each(rule.p)]
        case Threshold():
            return rule.of, [(t, 0) for t in _each(rule.t)]
    raise TypeError(f"no rule for {rule!r}")


def _each(value: Any) -> tuple[Any, ...]:
    return value if isinstance(value, tuple) else (value,)
