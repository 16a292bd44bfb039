"""Checking a lifted mask against the original computation, on example and on random inputs."""

from __future__ import annotations

import contextlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.fx import Interpreter, Node

from sparse_compile.expr import KV, H, Q, ScoreData, evaluate, evaluate_lookup, grid, is_learned
from sparse_compile.passes.dense_tables import mask_data, selection_data
from sparse_compile.passes.graph_edit import example_value
from sparse_compile.passes.lift.biases import Bias
from sparse_compile.passes.lift.data_masks import hides
from sparse_compile.passes.lift.examples import Examples, draws, example_of
from sparse_compile.passes.lift.kept import is_topk_index
from sparse_compile.passes.lift.masks import Keep, SiteMasks
from sparse_compile.passes.lift.prefix import CannotRun, Prefix, bytes_of, prefix_of
from sparse_compile.passes.lift.slice import Slicer
from sparse_compile.passes.lift.value import ABSORBING, Unliftable
from sparse_compile.selection.chunks import chunks
from sparse_compile.sites.site import LiftedMask, Refused, Visited

_CHUNK = 1 << 22
_MOST_RANDOM = 1 << 24
#: Queries and keys of the blocks whose pairs are counted.
_BLOCK = 32


@dataclass(frozen=True)
class Question:
    """What is to be compared.

    Attributes:
        masks: of the attention.
        keeps: for each operand, what it does.
        biases: what operands contribute to scores.
        lifted: what they were understood to be.
        examples: what the program is run with.
        ways: for each of the fallbacks, by which numbers the operands hide its keys; None: one does
            not.
    """

    masks: SiteMasks
    keeps: Sequence[Keep]
    biases: Sequence[Bias]
    lifted: LiftedMask
    examples: Examples
    ways: Sequence[Sequence[Sequence[float | None]]] = ()

    def fills(self, operand: int) -> list[float]:
        """What an operand holds where it masks, or what the scores get then."""
        return [float(fill) for _, fill in self.keeps[operand].hidden]

    @property
    def heads(self) -> int:
        """Query heads of the example."""
        return self.examples.size(self.masks.lengths[H])


def verify(asked: Question, verify_bytes: int, slicer: Slicer) -> Visited | None:
    """Compare a lifted mask with the program's own mask tensors.

    These come from the captured graph as it is, where that can be run so far, and not from the
    slice: what the slice gets wrong, the lifted mask does, too.

    Args:
        asked: the masks, and what they were understood to be.
        verify_bytes: the option of that name.
        slicer: knows the graphs.

    Returns:
        the pairs in blocks of the example, where the mask reads values that the example has; None
        elsewhere.

    Raises:
        Refused: when they differ, or when the tensors are too large to be computed for a check.
    """
    masks, examples = asked.masks, asked.examples
    needed = max(bytes_of(example_value(mask.node), examples.size) for mask in masks.site.masks)
    if needed > verify_bytes:
        raise Refused(
            f"checking its mask takes {needed / 2**30:.1f} GiB, more than verify_bytes allows",
            f'options={{"verify_bytes": {needed}}} allows it; or compile with a shorter example',
        )
    leaves = {leaf: example_of(leaf, examples) for leaf in masks.part.leaves}
    prefix = _prefix(masks, examples, slicer)
    pairs = _check(asked, prefix, leaves, moderate=masks.need_gradients)
    if prefix is not None and prefix.beside > _MOST_RANDOM:
        prefix = None
    for draw in draws(leaves.values()) if needed <= _MOST_RANDOM else ():
        drawn = {
            node: example_of(node, examples) if is_topk_index(node) else draw(value)
            for node, value in leaves.items()
        }
        with contextlib.suppress(_NotComputed):  # Random inputs that the program itself refuses.
            _check(asked, prefix, drawn)
    known = asked.lifted.program is not None and all(
        examples.value_of(leaf) is not None or not isinstance(example_value(leaf), Tensor)
        for leaf in leaves
    )
    return pairs if known else None


#: Ways in which pairs are hidden, or not: each of masks over [b, h, q, kv] that hold together.
Ways = Sequence[Sequence[Tensor]]


class _NotComputed(Refused):
    """The program's own operators failed."""


def _check(
    asked: Question, prefix: Prefix | None, leaves: Mapping[Node, Any], moderate: bool = False
) -> Visited:
    """Compare for some values of the leaves; the pairs in blocks, for each query."""
    try:
        tensors = _tensors(asked, prefix, leaves)
        kept = _kept(asked, tensors)
        _compare_biases(asked, leaves, tensors)
        if moderate:
            _check_moderate(asked, tensors)
        fallen = [_fallen(asked, tensors, ways) for ways in asked.ways]
    except Refused:
        raise
    except Exception as error:  # The user's operators: anything can be raised.
        raise _NotComputed(f"its mask could not be computed for a check: {error}") from error
    visible = _compare(asked, asked.lifted, leaves, [kept])
    before: Ways = [kept]
    for fallback, expected in zip(asked.lifted.fallbacks, fallen, strict=True):
        _compare(asked, fallback, leaves, expected, before)
        before = [*before, *expected]
    return visible


def _prefix(masks: SiteMasks, examples: Examples, slicer: Slicer) -> Prefix | None:
    """What comes before the masks; None where it cannot be run.

    Then the slice serves: nothing that is not known wrote to its memory.
    """

    def size(length: Any) -> int:
        if not examples.knows(length):
            raise CannotRun("a size is known only at run time")
        return examples.size(length)

    wanted = masks.wanted[: len(masks.site.masks)]
    try:
        return prefix_of(masks.site.scope, wanted, masks.part, slicer, size)
    except (CannotRun, Unliftable):
        return None


def _tensors(asked: Question, prefix: Prefix | None, leaves: Mapping[Node, Any]) -> Sequence[Any]:
    """The masks as the program computes them."""
    if prefix is not None:
        return prefix.run({**asked.examples.values, **leaves})
    with torch.no_grad():
        outputs: Sequence[Any] = Interpreter(asked.masks.part.graph_module()).run(*leaves.values())
    return outputs


def _kept(asked: Question, tensors: Sequence[Any]) -> list[Tensor]:
    """For each operand, which scores it keeps, over [b, h, q, kv]."""
    site, kept = asked.masks.site, []
    biased, heads = {one.mark for one in asked.biases}, asked.heads
    for mark, (operand, mask) in enumerate(zip(site.masks, tensors, strict=False)):
        if operand.role == "factor":
            continue
        mask = _unexpanded(mask)
        if operand.role == "add" and mark not in biased:
            _check_fills(mask, asked.fills(mark))
        kept.append(asked.masks.spread(~_hidden(asked, mark, mask), operand, heads))
    return kept


def _unexpanded(tensor: Tensor) -> Tensor:
    """A tensor without what was only expanded."""
    for dim in range(tensor.dim()):
        if tensor.stride(dim) == 0 and tensor.shape[dim] > 1:
            tensor = tensor.narrow(dim, 0, 1)
    return tensor


def _fallen(
    asked: Question, tensors: Sequence[Any], ways: Sequence[Sequence[float | None]]
) -> Ways:
    """Ways in which pairs are hidden, as masks."""
    site, heads = asked.masks.site, asked.heads
    found = []
    for way in ways:
        together = []
        for mark, (operand, fill, mask) in enumerate(zip(site.masks, way, tensors, strict=False)):
            if operand.role == "factor":
                continue
            hidden = _hidden(asked, mark, _unexpanded(mask), fill)
            holds = ~hidden if fill is None else hidden
            together.append(asked.masks.spread(holds, operand, heads))
        found.append(together)
    return found


def _hidden(asked: Question, mark: int, mask: Tensor, fill: float | None = None) -> Tensor:
    """Where an operand hides scores; with ``fill``, by that alone."""
    role, keep = asked.masks.site.masks[mark].role, asked.keeps[mark]
    if role != "add":
        return mask.bool() if role == "drop" else ~mask.bool()
    if keep.data:
        return hides(mask, fill)
    return _is_any(mask, asked.fills(mark) if fill is None else [fill])


def _is_any(mask: Tensor, fills: Sequence[float]) -> Tensor:
    """Where a tensor holds one of some numbers."""
    found = torch.zeros_like(mask, dtype=torch.bool)
    for fill in fills:
        found |= mask == fill
    return found


def _compare_biases(asked: Question, leaves: Mapping[Node, Any], tensors: Sequence[Any]) -> None:
    """Raise where what is read in the place of an operand differs from what it adds."""
    computed, masks, examples = asked.lifted.learned, asked.masks, asked.examples
    read: Sequence[Tensor] = ()
    if computed is not None and any(one.cases is not None for one in asked.biases):
        direct = {masks.site.masks[one.mark].node: tensors[one.mark] for one in asked.biases}
        values = {**direct, **examples.values, **leaves}
        with torch.no_grad():
            read = Interpreter(computed.program).run(*(values[leaf] for leaf in computed.leaves))
    lengths = {symbol: examples.size(expr) for symbol, expr in masks.lengths.items()}
    for one in asked.biases:
        if is_learned(one.lookup) and one.cases is None:
            continue  # the operand itself
        operand = masks.site.masks[one.mark]
        found = masks.spread(tensors[one.mark], operand, asked.heads)
        each = found.shape[0] * found.shape[1] * found.shape[3]
        for start, stop in chunks(found.shape[2], each, _CHUNK):
            part = found[:, :, start:stop]
            queries = range(start, stop)
            axes = zip("bh", part.shape, strict=False)
            where = {name: range(size) for name, size in axes}
            coordinates = grid(part.device, **where, q=queries, kv=range(part.shape[3]))
            data = ScoreData(coordinates, lengths[Q], lengths[KV], learned=read)
            expected = evaluate_lookup(one.lookup, part, data)
            masked = _hidden(asked, one.mark, part)
            if not torch.equal(expected.masked_fill(masked, 0), part.masked_fill(masked, 0)):
                raise Refused(
                    "internal check failed: a bias as understood differs from the program's",
                    "please report this bias",
                )


def _check_moderate(asked: Question, tensors: Sequence[Any]) -> None:
    """Raise where the example adds so much that the log-sum-exp of a row is that number alone.

    ``(1 - m) * min`` does, where m is 2: how many keys share the weight is lost to the backward.
    """
    if any(bool((tensors[one.mark] > -ABSORBING).any()) for one in asked.biases):
        raise Refused(
            "it adds numbers as large as 1e30 to scores, whose gradients are lost to rounding",
            "pass a mask of 0 and 1, or of bools",
        )


def _check_fills(mask: Tensor, fills: Sequence[float]) -> None:
    known = (mask == 0) | _is_any(mask, fills)
    if not bool(known.all()):
        raise Refused(
            f"internal check failed: it adds {mask[~known][0].item()}, which was not understood",
            "please report this mask",
        )


def _compare(
    asked: Question,
    lifted: LiftedMask,
    leaves: Mapping[Node, Any],
    ways: Ways,
    ignored: Ways = (),
) -> Visited:
    """Raise where a mask is not what holds in one of some ways, but for pairs that do not matter.

    Returns:
        the pairs in its blocks, for each query.
    """
    masks, examples = asked.masks, asked.examples
    lengths = {symbol: examples.size(expr) for symbol, expr in masks.lengths.items()}
    outputs: Sequence[Any] = ()
    if lifted.program is not None:
        values = {**examples.values, **leaves}
        with torch.no_grad():
            outputs = Interpreter(lifted.program).run(*(values[leaf] for leaf in lifted.leaves))
    tables, sizes = mask_data(lifted, outputs, lengths[Q], lengths[KV])
    selection = selection_data(lifted, outputs)
    chosen = None if selection is None else selection.dense(lengths[Q], lengths[KV])
    if chosen is not None and chosen.shape[1] > 1:
        chosen = chosen.repeat_interleave(lengths[H] // chosen.shape[1], 1)
    device = masks.device
    given = [mask for way in (*ways, *ignored) for mask in way]
    shape = [max([1, *(mask.shape[axis] for mask in given)]) for axis in (0, 1)]
    pairs, partial, each = 0.0, 0.0, shape[0] * shape[1] * lengths[KV]
    for start, stop in chunks(lengths[Q], each, _CHUNK, tile=_BLOCK):
        queries, keys = range(start, stop), range(lengths[KV])
        coordinates = grid(device, b=range(shape[0]), h=range(shape[1]), q=queries, kv=keys)
        found = evaluate(lifted.mask, coordinates, lengths[Q], lengths[KV], tables, sizes)
        if chosen is not None:
            found = found & chosen[:, :, start:stop]
        expected = _hold(ways, start, stop, device)
        if masks.site.causal:
            expected = expected & (coordinates["kv"] <= coordinates["q"])
        wrong = (found != expected) & ~_hold(ignored, start, stop, device)
        _raise_if_any(wrong, start)
        held, hidden = (_pairs_in_blocks(x, len(queries), len(keys)) for x in (found, ~found))
        pairs += held
        # Blocks that hold both are counted twice.
        partial += max(0.0, held + hidden - len(queries) * len(keys))
    n_q = max(1, lengths[Q])
    return Visited(pairs / n_q, partial / n_q)


def _pairs_in_blocks(found: Tensor, rows: int, keys: int) -> float:
    """Pairs in square blocks of bool [..., 1 or rows, 1 or keys] that hold a True, on average."""
    found = found.expand(*found.shape[:-2], rows, keys)
    count = max(1, found.shape[:-2].numel())
    padded = torch.nn.functional.pad(found, (0, -keys % _BLOCK))
    held = padded.reshape(*padded.shape[:-1], -1, _BLOCK).any(-1)
    pairs = 0
    for line in torch.split(held, _BLOCK, -2):
        pairs += int(line.any(-2).sum()) * line.shape[-2] * min(_BLOCK, keys)
    return pairs / count


def _hold(ways: Ways, start: int, stop: int, device: torch.device) -> Tensor:
    """Where one of some ways holds, for some queries."""
    found = torch.zeros((), dtype=torch.bool, device=device)
    for way in ways:
        together = torch.ones((), dtype=torch.bool, device=device)
        for mask in way:
            together = together & (mask[:, :, start:stop] if mask.shape[2] > 1 else mask)
        found = found | together
    return found


def _raise_if_any(wrong: Tensor, start: int) -> None:
    if not bool(wrong.any()):
        return
    wrong = wrong[(None,) * (4 - wrong.dim())]
    b, h, q, kv = (int(i) for i in wrong.nonzero()[0])
    raise Refused(
        f"internal check failed: its mask as understood differs from the program's at "
        f"(b={b}, h={h}, q={q + start}, kv={kv})",
        "please report this mask",
    )
