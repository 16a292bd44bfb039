"""Schedule: the order in which tiles of a kernel are handed out, and how heavy lines are split.

The hardware starts the programs of a launch in order, each as soon as a multiprocessor has room: a
dynamic queue. So the worklist is sorted by cost, largest first, and a line that would outlast the
others (the row of a global token sees every key) is cut into parts, which leave their results in
*slots* and are merged afterwards.
"""

from __future__ import annotations

import functools
import heapq
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from sparse_compile.layout.block_layout import Load
from sparse_compile.spec.target import Target

#: What starting and finishing a tile costs, in blocks.
TILE_COST = 2
#: No part is smaller than this many blocks: its partial result has to repay being merged.
SMALLEST_PART = 16
#: A line that takes more than this share of a worker's time is split.
LARGEST_SHARE = 0.25
#: Lines whose costs differ by less than a part in so many keep their order, and so their locality.
COST_LEVELS = 8
#: Lines are even enough to stay in order if the largest costs at most so many times the average.
EVEN = 2.5
EVERYTHING = (1 << 31) - 1
#: Worklists of whole lines are made for at least so many.
_LINES = 4096
_CPU = torch.device("cpu")


@dataclass(frozen=True)
class Schedule:
    """The worklist of one kernel.

    Attributes:
        items: int32 [n, 4]: line, first and end of the blocks to visit, slot or -1.
        heavy: the first so many items are handed out for all heads before any other.
        merges: int32 [m, 3]: line, first slot and number of parts of each split line.
        slots: number of slots.
        load: of its lines; None if it was unpacked, where kernels alone use it.
    """

    items: Tensor
    heavy: int
    merges: Tensor
    slots: int
    load: Load | None = None

    @functools.cached_property
    def packed(self) -> tuple[Tensor, Tensor]:
        """The worklist as two tensors, so that a graph can hold it; made once, so copy them.

        Returns:
            int32 [4 * n + 3 * m], items and then merges; and one without elements, whose shape
            [m, slots, heavy, 0] says what the host has to know, without asking the device.
        """
        numbers = self.merges.shape[0], self.slots, self.heavy, 0
        both = torch.cat([self.items.flatten(), self.merges.flatten()])
        return both, self.items.new_empty(numbers)

    @staticmethod
    def unpack(both: Tensor, numbers: Tensor) -> Schedule:
        """Views into what :attr:`packed` holds; no copy, no synchronisation."""
        m, slots, heavy, _ = numbers.shape
        merges = 3 * m
        items = both[: both.numel() - merges].view(-1, 4)
        return Schedule(items, heavy, both[items.numel() :].view(m, 3), slots)

    @functools.cached_property
    def costs(self) -> Tensor:
        """int64 [n] on the CPU: blocks of each item, with :data:`TILE_COST`."""
        assert self.load is not None
        line, lo, hi, _ = self.items.cpu().long().unbind(1)
        return torch.where(hi == EVERYTHING, self.load.lines[line], hi - lo) + TILE_COST

    def utilisation(self, members: int, workers: int) -> float:
        """Modelled: busy time of all workers over their number times the makespan.

        Args:
            members: heads times batch entries that the worklist is repeated for.
            workers: programs that run at a time.

        >>> even = make_schedule(torch.full([8], 14), members=4, workers=16)
        >>> even.utilisation(members=4, workers=16)
        1.0
        """
        costs = self.costs.tolist()
        heavy = [cost for cost in costs[: self.heavy] for _ in range(members)]
        free = [0] * workers
        for cost in [*heavy, *costs[self.heavy :] * members]:
            heapq.heapreplace(free, free[0] + cost)
        return sum(free) / (workers * max(free)) if max(free) else 1.0


@functools.lru_cache(maxsize=16)
def workers_of(device: torch.device) -> int:
    """Programs that a GPU runs at a time: two to a multiprocessor; 8 where there is no GPU."""
    return 2 * Target.of(device).workers if device.type == "cuda" else 8


def make_schedule(
    load: Load | Tensor, members: int, workers: int, device: torch.device | None = None
) -> Schedule:
    """The worklist of the lines of a section.

    Args:
        load: blocks that lines visit, or may visit where that is only known on the device; those of
            each line as int64 on the CPU will do.
        members: heads times batch entries.
        workers: programs that run at a time.
        device: where the kernel runs; default the CPU.

    >>> one_heavy = make_schedule(torch.tensor([900, 9, 9, 9]), members=1, workers=4)
    >>> one_heavy.slots, one_heavy.heavy, one_heavy.merges.tolist()
    (16, 16, [[0, 0, 16]])
    """
    if isinstance(load, Tensor):
        load = Load.of(load)
    device, cost = device or _CPU, load.total + TILE_COST * load.n
    largest = max(SMALLEST_PART, int(cost * members / workers * LARGEST_SHARE))
    if load.most <= largest and load.most * load.n <= EVEN * cost:
        # No line needs to be split, or to be started before others.
        return _whole_lines(load, device)
    if not isinstance(load.made, Tensor):
        return make_schedule(load.lines, members, workers, device)
    found = _sorted_schedule(load, largest)
    return replace(found, items=found.items.to(device), merges=found.merges.to(device))


def _whole_lines(load: Load, device: torch.device) -> Schedule:
    """All lines in order, the last first."""
    capacity = max(_LINES, 1 << (load.n - 1).bit_length())
    items, nothing = _all_lines(capacity, device)
    return Schedule(items[capacity - load.n :], 0, nothing, 0, load)


@functools.lru_cache(maxsize=16)
def _all_lines(capacity: int, device: torch.device) -> tuple[Tensor, Tensor]:
    """The items of so many whole lines, the last first, and no merges.

    Those of fewer lines are at the end, so a new length has nothing to make.
    """
    line = torch.arange(capacity - 1, -1, -1)
    whole = [torch.zeros_like(line), torch.full_like(line, EVERYTHING), torch.full_like(line, -1)]
    items = torch.stack([line, *whole], 1).to(torch.int32)
    return items.to(device), torch.empty(0, 3, dtype=torch.int32, device=device)


def _sorted_schedule(load: Load, largest: int) -> Schedule:
    """The worklist of lines of different costs, none of its parts over ``largest`` blocks."""
    room = load.lines
    line = torch.arange(room.numel())
    parts = (-(-room // largest)).clamp(min=1)
    split = parts > 1
    slots = torch.where(split, parts, 0)
    first_slot = slots.cumsum(0) - slots
    of = torch.repeat_interleave(parts)
    number = torch.arange(of.numel()) - (parts.cumsum(0) - parts)[of]
    size = -(-room // parts)
    lo = number * size[of]
    hi = torch.where(split[of], lo + size[of], EVERYTHING)
    slot = torch.where(split[of], first_slot[of] + number, -1)
    costs = torch.where(split[of], size[of], room[of]) + TILE_COST
    order, heavy = _order(costs, split[of])
    items = torch.stack([line[of], lo, hi, slot], 1)[order].to(torch.int32)
    merges = torch.stack([line, first_slot, parts], 1)[split].to(torch.int32)
    return Schedule(items, heavy, merges, int(slots.sum()), load)


def _order(costs: Tensor, split: Tensor) -> tuple[Tensor, int]:
    """The items in the order to start them, and how many come first for all heads."""
    typical = int(costs.median()) if costs.numel() else 0
    heavy = split | (costs > 4 * typical)
    level = costs * COST_LEVELS // max(int(costs.max()), 1) if costs.numel() else costs
    # Later lines first among equals: under a causal mask they have more to do.
    place = torch.arange(costs.numel() - 1, -1, -1)
    key = (heavy.long() * (COST_LEVELS + 1) + level) * (costs.numel() + 1) - place
    return key.argsort(descending=True), int(heavy.sum())
