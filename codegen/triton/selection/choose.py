"""Launch the kernel that chooses blocks by their scores."""

from __future__ import annotations

import functools
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from sparse_compile.codegen.runtime.launch import Launcher, current, launchers_of
from sparse_compile.codegen.triton.layout.key import LONGEST
from sparse_compile.codegen.triton.selection.printable import free_sizes, key_of
from sparse_compile.codegen.triton.selection.source import HELD, ChooseSpec, choose_kernel
from sparse_compile.patterns.checks import UPPER_LEFT
from sparse_compile.patterns.rules import Threshold, TopK, TopP, TopRatio, exact
from sparse_compile.selection.prepared import Prepared

#: Blocks that a row may have for the rule that needs nothing but the order of scores.
_MOST_IN_ORDER = 1 << 20
#: Lists that do not fill a GPU.
_FEW = 256


def can_choose(made: Prepared) -> bool:
    """Whether the kernel can choose for a task: not from too many blocks."""
    task, most = made.task, _MOST_IN_ORDER if isinstance(made.pattern, TopK) else HELD
    fits = task.blocks <= most and max(task.q.shape[2], task.k.shape[2]) <= LONGEST
    return fits and task.rows * task.blocks < 1 << 40


@functools.lru_cache(maxsize=256)
def _kernel(spec: ChooseSpec) -> Launcher:
    return launchers_of(choose_kernel(spec))["choose"]


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
        return ChooseSpec(key, given, self.rule[0], _power(max(seen, 32)), _power(room), few)

    def __call__(self, scores: Tensor, first: int, end: int) -> None:
        """Write the lists of the units ``first, ..., end - 1``, from [B, lists, units, blocks]."""
        made, pattern, task = self.made, self.made.pattern, self.made.task
        visible = task.visible
        spec, rule = self.spec(first, end), self.rule[1]
        given, key = spec.given, spec.key
        batch, lists, units, room = made.index.shape
        may = visible.may(first, end, lists) if given else None
        shift = 0 if pattern.align == UPPER_LEFT else task.k.shape[2] - task.q.shape[2]
        grid = end - first, batch * lists
        values: dict[str, Any] = {
            "SCORES": scores.contiguous(),
            "VISIBLE": rule if may is None else may.contiguous(),
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
            **_strides(may),
            **({} if given else free_sizes(visible, key)),
        }
        with current(scores.device):
            _kernel(spec)(grid, values)


def _strides(may: Tensor | None) -> dict[str, int]:
    steps = [0, 0, 0]
    if may is not None:
        may = may.contiguous()
        steps = [*(may.stride(d) if may.shape[d] > 1 else 0 for d in (0, 1)), may.stride(2)]
    names = ("visible_stride_b", "visible_stride_list", "visible_stride_row")
    return dict(zip(names, steps, strict=True))


def _power(n: int) -> int:
    return 1 << (n - 1).bit_length()


def choose_spec(made: Prepared) -> ChooseSpec:
    """What the kernel is generated for that chooses for the first units of a task."""
    return Chooser(made).spec(*made.chunks(by_kernel=True)[0])


@functools.singledispatch
def _rule_of(rule: Any) -> tuple[str, list[tuple[float, float]]]:
    """The kind of a rule, and two numbers for each list, or for all."""
    raise TypeError(f"no rule for {rule!r}")


def _each(value: Any) -> tuple[Any, ...]:
    return value if isinstance(value, tuple) else (value,)


@_rule_of.register
def _(rule: TopK) -> tuple[str, list[tuple[float, float]]]:
    return "top_k", [(min(k, _MOST_IN_ORDER), 0) for k in _each(rule.k)]


@_rule_of.register
def _(rule: TopRatio) -> tuple[str, list[tuple[float, float]]]:
    return "top_ratio", [exact(ratio) for ratio in _each(rule.ratio)]


@_rule_of.register
def _(rule: TopP) -> tuple[str, list[tuple[float, float]]]:
    # Where all is wanted, a sum that rounding makes too large must not leave out the last ones.
    return "top_p", [(float("inf") if p == 1 else p, 0) for p in _each(rule.p)]


@_rule_of.register
def _(rule: Threshold) -> tuple[str, list[tuple[float, float]]]:
    return rule.of, [(t, 0) for t in _each(rule.t)]
