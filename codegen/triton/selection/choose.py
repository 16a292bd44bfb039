"""Launch the kernel that chooses blocks by their scores."""

from __future__ import annotations

import functools
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from sparse_compile.codegen.triton.layout.key import LONGEST
from sparse_compile.codegen.triton.selection.printable import key_of, launch
from sparse_compile.codegen.triton.selection.source import HELD, ChooseSpec, choose_kernel
from sparse_compile.codegen.triton.tile import power_of_two
from sparse_compile.patterns.checks import UPPER_LEFT
from sparse_compile.patterns.rules import Threshold, TopK, TopP, TopRatio, exact
from sparse_compile.selection.builders import Prepared

#: Blocks that a row may have for the rule that needs nothing but the order of scores.
_MOST_IN_ORDER = 1 << 20
#: Lists that do not fill a GPU.
_FEW = 256


def can_choose(made: Prepared) -> bool:
    """Whether the kernel can choose for a task: not from too many blocks."""
    task, most = made.task, _MOST_IN_ORDER if isinstance(made.pattern, TopK) else HELD
    fits = task.blocks <= most and max(task.q.shape[2], task.k.shape[2]) <= LONGEST
    return fits and task.rows * task.blocks < 1 << 40


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
        key = key_of(visible, pattern.unit_q, pattern.block_kv)
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
        launch(choose_kernel, spec, scores.device, grid, values)


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
