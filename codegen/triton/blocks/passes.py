"""Passes over the blocks of a layout: a kernel section after section, and merges of split lines."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from sparse_compile.codegen.call import AttentionCall
from sparse_compile.codegen.entry import labelled
from sparse_compile.codegen.triton.blocks import arguments
from sparse_compile.codegen.triton.calls import Running
from sparse_compile.codegen.triton.entries import axis_of, merge_of
from sparse_compile.codegen.triton.tile import Tile, padded
from sparse_compile.layout.schedule import Schedule
from sparse_compile.spec import AttentionSpec


@dataclass(frozen=True)
class Pass:
    """One of the three kernels that loop over blocks.

    Attributes:
        name: of the kernel.
        axis: side of its lines, ``"q"`` or ``"kv"``.
        sections: the views of each.
        extent: tokens of a tile.
        subtiles: programs to a line.
        widths: of the rows of its results, by name.
    """

    name: str
    axis: str
    sections: tuple[tuple[int, ...], ...]
    extent: int
    subtiles: int
    widths: Mapping[str, int]

    @staticmethod
    def of(name: str, spec: AttentionSpec, tile: Tile, widths: Mapping[str, int]) -> Pass:
        """That of a kernel of a spec."""
        axis = axis_of(name)
        extent, block = tile.extent(axis), spec.block_q if axis == "q" else spec.block_kv
        return Pass(name, axis, spec.sections(axis), extent, block // extent, widths)

    def run(self, running: Running, tensors: Mapping[str, Tensor], unused: Tensor) -> None:
        """Launch it.

        Args:
            running: the call.
            tensors: what it takes beside the operands, its results among them.
            unused: fp32, stands for parts where no line is split.
        """
        batch, heads = running.call.q.shape[0], self._heads(running.call)
        for section, (given, work) in enumerate(self._sections(running)):
            programs = self.subtiles * batch * heads
            parts = self._parts(work.slots * programs, unused)
            grid = (work.items.shape[0] * programs,)
            running.start(labelled(self.name, section), grid, {**tensors, **given, **parts})
            if work.slots:
                of_merge = work.merges.shape[0] * self.subtiles, heads, batch
                self._merge(running, section, of_merge, {**tensors, **parts, "merges": work.merges})

    def _heads(self, call: AttentionCall) -> int:
        return (call.q if self.axis == "q" else call.k).shape[1]

    def _sections(self, running: Running) -> list[tuple[dict[str, Any], Schedule]]:
        """For each section its lists and its worklist, by name, and the latter whole."""
        call, layout = running.call, running.call.blocks
        members = call.q.shape[0] * self._heads(call)
        key = self.axis, members
        if key not in layout.derived:
            # The lists may be being made: what does not wait for them comes first.
            lists = [arguments.list_values(layout, self.axis, own) for own in self.sections]
            works = layout.schedules(self.axis, members, running.workers, call.q.device)
            layout.derived[key] = [
                ({**given, "items": w.items, "n_items": w.items.shape[0], "heavy": w.heavy}, w)
                for given, w in zip(lists, works, strict=True)
            ]
        found: list[tuple[dict[str, Any], Schedule]] = layout.derived[key]
        return found

    def _parts(self, slots: int, unused: Tensor) -> dict[str, Tensor]:
        """Room for the parts of results, fp32 [slots, rows of a tile, columns]."""
        if not slots:
            return {f"PART_{name}": unused for name in self.widths}
        return {
            f"PART_{name}": torch.empty(
                (slots, self.extent, padded(width) if width > 1 else 1),
                dtype=torch.float32,
                device=unused.device,
            )
            for name, width in self.widths.items()
        }

    def _merge(
        self, running: Running, section: int, grid: tuple[int, ...], given: dict[str, Any]
    ) -> None:
        """Merge the parts of split lines: by their log-sum-exps, or the sums of gradients."""
        label = labelled(merge_of(self.name), section)
        if self.name == "forward":
            running.start(label, grid, given)
            return
        for name, width in self.widths.items():
            one = {"PART": given[f"PART_{name}"], "GRAD": given[name], "merges": given["merges"]}
            running.start(label, grid, one, DIM=width, PAD=padded(width))
