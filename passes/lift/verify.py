"""Checking a lifted mask against the original computation, on example and on random inputs."""

from __future__ import annotations

import functools
import operator
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import sympy
import torch
from torch import Tensor
from torch.fx import Interpreter, Node

from sparse_compile.expr import KV, H, Q, evaluate
from sparse_compile.passes.dense_tables import mask_data, selection_data
from sparse_compile.passes.lift.operands import Refused
from sparse_compile.passes.lift.prefix import CannotRun, Prefix, prefix_of
from sparse_compile.passes.lift.rankings import is_topk_index
from sparse_compile.passes.lift.sizes import size_expr
from sparse_compile.passes.lift.slice import Slice, Slicer, Wanted
from sparse_compile.passes.lift.value import Unliftable
from sparse_compile.sites.site import LiftedMask, MaskOperand, Scope

_ORDER = ("b", "h", "q", "kv")
_CHUNK = 1 << 22
_MOST_RANDOM = 1 << 24
#: Queries and keys of the blocks whose pairs are counted.
_BLOCK = 32


@dataclass(frozen=True)
class Examples:
    """Concrete values for a captured graph's inputs and sizes.

    Attributes:
        values: of the outermost graph's placeholders: tensors, or ints.
        symbols: of torch's size symbols.
    """

    values: Mapping[Node, Any]
    symbols: Mapping[sympy.Symbol, int]

    @staticmethod
    def of(scope: Scope, example_inputs: Sequence[Any]) -> Examples:
        """From what Dynamo passes to a backend."""
        while scope.parent is not None:
            scope = scope.parent
        holders = [node for node in scope.gm.graph.nodes if node.op == "placeholder"]
        values = dict(zip(holders, example_inputs, strict=True))
        symbols: dict[sympy.Symbol, int] = {}
        for node, value in values.items():
            symbols.update(_symbols(node.meta.get("example_value"), value))
        for node, value in values.items():
            if isinstance(value, torch.SymInt):
                values[node] = int(size_expr(value).xreplace(symbols))
        return Examples(values, symbols)

    def size(self, size: Any) -> int:
        """The example value of a size."""
        expr = size if isinstance(size, sympy.Basic) else size_expr(size)
        return int(expr.xreplace(self.symbols))


def _symbols(fake: Any, value: Any) -> Iterator[tuple[sympy.Symbol, int]]:
    if isinstance(fake, torch.SymInt):
        symbol = fake.node.expr
        # Integer inputs come as SymInts too; what they were in this call is their hint.
        number = value if isinstance(value, int) else value.node.hint
        if symbol.is_Symbol and number is not None:
            yield symbol, int(number)
    elif isinstance(fake, Tensor) and isinstance(value, Tensor):
        for size, number in zip(fake.shape, value.shape, strict=True):
            yield from _symbols(size, int(number))


@dataclass(frozen=True)
class Check:
    """One mask to be checked.

    Attributes:
        scope: where the masks are read.
        part: the slice whose first outputs are the operands' tensors.
        wanted: the operands' tensors, each with the first node that reads it.
        operands: the mask operands.
        fills: for each operand, the scores it gives to masked entries.
        axes: the axes of the scores.
        causal: SDPA's ``is_causal``.
        lengths: number of batch entries, heads, queries and keys.
    """

    scope: Scope
    part: Slice
    wanted: Sequence[Wanted]
    operands: Sequence[MaskOperand]
    fills: Sequence[Sequence[float]]
    axes: Sequence[str]
    causal: bool
    lengths: Mapping[sympy.Symbol, sympy.Expr]


def verify(
    check: Check, lifted: LiftedMask, examples: Examples, verify_bytes: int, slicer: Slicer
) -> float | None:
    """Compare the lifted mask with the program's own mask tensors.

    These come from the captured graph as it is, where that can be run so far, and not from the
    slice: what the slice gets wrong, the lifted mask does, too.

    Returns:
        pairs in blocks that hold an allowed one, for each query of the example, where the mask
        reads values that the example has; None elsewhere.

    Raises:
        Refused: when they differ, or when the tensors are too large to be computed for a check.
    """
    needed = _bytes(check, examples)
    if needed > verify_bytes:
        raise Refused(
            f"checking its mask takes {needed / 2**30:.1f} GiB, more than verify_bytes allows",
            f'options={{"verify_bytes": {needed}}} allows it; or compile with a shorter example',
        )
    leaves = [_example(leaf, examples) for leaf in check.part.leaves]
    prefix = _prefix(check, examples, slicer)
    try:
        masks = _kept(check, _tensors(check, prefix, leaves, examples))
    except Refused:
        raise
    except Exception as error:  # The user's operators: anything can be raised.
        raise Refused(f"its mask could not be computed for a check: {error}") from error
    pairs = _compare(check, lifted, leaves, masks, examples)
    if prefix is not None and prefix.beside > _MOST_RANDOM:
        prefix = None
    for draw in _draws(leaves) if needed <= _MOST_RANDOM else ():
        leaves = [
            _example(node, examples) if is_topk_index(node) else draw(leaf)
            for node, leaf in zip(check.part.leaves, leaves, strict=True)
        ]
        try:
            masks = _kept(check, _tensors(check, prefix, leaves, examples))
        except Refused:
            raise
        except Exception:  # Random inputs that the program itself refuses.
            continue
        _compare(check, lifted, leaves, masks, examples)
    known = lifted.program is not None and all(
        leaf in examples.values or not isinstance(leaf.meta["example_value"], Tensor)
        for leaf in check.part.leaves
    )
    return pairs if known else None


def _bytes(check: Check, examples: Examples) -> int:
    largest = 0
    for operand in check.operands:
        fake = operand.node.meta["example_value"]
        count = fake.dtype.itemsize
        for size, stride in zip(fake.shape, fake.stride(), strict=True):
            count *= 1 if isinstance(stride, int) and stride == 0 else examples.size(size)
        largest = max(largest, count)
    return largest


def _example(leaf: Node, examples: Examples) -> Any:
    """The example value of a leaf; made up for results of operations that are not run here."""
    if leaf in examples.values:
        return examples.values[leaf]
    fake = leaf.meta["example_value"]
    if not isinstance(fake, Tensor):
        return examples.size(fake) if size_expr(fake).free_symbols <= set(examples.symbols) else 1
    shape = [examples.size(size) for size in fake.shape]
    if fake.dtype.is_floating_point:
        return torch.randn(shape, device=fake.device).to(fake.dtype)
    if is_topk_index(leaf):
        return _topk(leaf, shape, examples)
    return torch.randint(0, 2, shape, device=fake.device).to(fake.dtype)


def _topk(leaf: Node, shape: Sequence[int], examples: Examples) -> Tensor:
    """Indices as a top-k gives them: distinct, and all that there may be occur."""
    source: Any = leaf.args[0]
    given = source.args[0] if source.args else source.kwargs["input"]
    full = [examples.size(size) for size in given.meta["example_value"].shape]
    (dim,) = [d for d, (a, b) in enumerate(zip(shape, full, strict=True)) if a != b] or [-1]
    device = leaf.meta["example_value"].device
    return torch.rand(full, device=device).topk(shape[dim], dim).indices


def _prefix(check: Check, examples: Examples, slicer: Slicer) -> Prefix | None:
    """What comes before the masks; None where it cannot be run.

    Then the slice serves: nothing that is not known wrote to its memory.
    """

    def size(length: Any) -> int:
        try:
            if size_expr(length).free_symbols <= set(examples.symbols):
                return examples.size(length)
        except Unliftable as error:
            raise CannotRun(str(error)) from error
        raise CannotRun("a size is known only at run time")

    try:
        return prefix_of(check.scope, check.wanted, check.part, slicer, size)
    except CannotRun:
        return None


def _tensors(
    check: Check, prefix: Prefix | None, leaves: Sequence[Any], examples: Examples
) -> Sequence[Any]:
    """The masks as the program computes them."""
    if prefix is not None:
        given = dict(zip(check.part.leaves, leaves, strict=True))
        return prefix.run({**examples.values, **given}, examples.size)
    with torch.no_grad():
        outputs: Sequence[Any] = Interpreter(check.part.graph_module()).run(*leaves)
    return outputs


def _kept(check: Check, tensors: Sequence[Any]) -> list[Tensor]:
    """For each operand, which scores it keeps, over [b, h, q, kv]."""
    masks = []
    for operand, fills, mask in zip(check.operands, check.fills, tensors, strict=False):
        for dim in range(mask.dim()):
            if mask.stride(dim) == 0 and mask.shape[dim] > 1:
                mask = mask.narrow(dim, 0, 1)
        if operand.role == "add":
            _check_fills(mask, fills)
        keep = mask == 0 if operand.role == "add" else mask.bool()
        keep = ~keep if operand.role == "drop" else keep
        masks.append(_on_axes(keep, check.axes))
    return masks


def _check_fills(mask: Tensor, fills: Sequence[float]) -> None:
    known = mask == 0
    for fill in fills:
        known |= mask == fill
    if not bool(known.all()):
        raise Refused(
            f"internal check failed: it adds {mask[~known][0].item()}, which was not understood",
            "please report this mask",
        )


def _on_axes(mask: Tensor, axes: Sequence[str]) -> Tensor:
    while mask.dim() > len(axes):
        mask = mask.squeeze(0)
    mask = mask[(None,) * (len(axes) - mask.dim())]
    for position, name in enumerate(_ORDER):
        if name not in axes:
            mask = mask.unsqueeze(position)
    return mask


def _compare(
    check: Check,
    lifted: LiftedMask,
    leaves: Sequence[Any],
    masks: Sequence[Tensor],
    examples: Examples,
) -> float:
    """Raise where the masks differ; the pairs in their blocks, for each query."""
    lengths = {symbol: examples.size(expr) for symbol, expr in check.lengths.items()}
    outputs = _run_program(check, lifted, leaves, examples)
    tables, sizes = mask_data(lifted, outputs, lengths[Q], lengths[KV])
    selection = selection_data(lifted, outputs)
    chosen = None if selection is None else selection.dense(lengths[Q], lengths[KV])
    if chosen is not None and chosen.shape[1] > 1:
        chosen = chosen.repeat_interleave(lengths[H] // chosen.shape[1], 1)
    device = masks[0].device
    shape = functools.reduce(operator.and_, (mask[:, :, :1, :1] for mask in masks)).shape
    rows = max(1, _CHUNK // max(1, shape[0] * shape[1] * lengths[KV]))
    rows = rows // _BLOCK * _BLOCK or rows
    pairs = 0.0
    for start in range(0, lengths[Q], rows):
        coordinates = _coordinates(shape, start, min(start + rows, lengths[Q]), lengths[KV], device)
        found = evaluate(lifted.mask, coordinates, lengths[Q], lengths[KV], tables, sizes)
        if chosen is not None:
            found = found & chosen[:, :, start : start + rows]
        expected = torch.ones((), dtype=torch.bool, device=device)
        for mask in masks:
            expected = expected & (mask[:, :, start : start + rows] if mask.shape[2] > 1 else mask)
        if check.causal:
            expected = expected & (coordinates["kv"] <= coordinates["q"])
        _raise_if_different(found, expected, start)
        pairs += _pairs_in_blocks(found, coordinates["q"].shape[0], lengths[KV])
    return pairs / max(1, lengths[Q])


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


def _run_program(
    check: Check,
    lifted: LiftedMask,
    leaves: Sequence[Any],
    examples: Examples,
) -> Sequence[Any]:
    if lifted.program is None:
        return ()
    values = dict(zip(check.part.leaves, leaves, strict=True))
    inputs = [values[leaf] if leaf in values else examples.values[leaf] for leaf in lifted.leaves]
    with torch.no_grad():
        outputs: Sequence[Any] = Interpreter(lifted.program).run(*inputs)
    return outputs


def _coordinates(
    shape: Sequence[int], start: int, stop: int, n_kv: int, device: torch.device
) -> dict[str, Tensor]:
    return {
        "b": torch.arange(shape[0], device=device)[:, None, None, None],
        "h": torch.arange(shape[1], device=device)[:, None, None],
        "q": torch.arange(start, stop, device=device)[:, None],
        "kv": torch.arange(n_kv, device=device),
    }


def _raise_if_different(found: Tensor, expected: Tensor, start: int) -> None:
    wrong = found != expected
    if not bool(wrong.any()):
        return
    wrong = wrong[(None,) * (4 - wrong.dim())]
    b, h, q, kv = (int(i) for i in wrong.nonzero()[0])
    raise Refused(
        f"internal check failed: its mask as understood differs from the program's at "
        f"(b={b}, h={h}, q={q + start}, kv={kv})",
        "please report this mask",
    )


def _draws(leaves: Sequence[Any]) -> list[Callable[[Any], Any]]:
    """Ways to make other inputs. On a GPU only values that occurred: an index out of range there
    would end the process."""
    tensors = [leaf for leaf in leaves if isinstance(leaf, Tensor)]
    if not tensors:
        return []
    generator = torch.Generator().manual_seed(0)
    small = all(leaf.device.type == "cpu" for leaf in tensors)

    def shuffled(leaf: Any) -> Any:
        if not isinstance(leaf, Tensor) or leaf.numel() == 0:
            return leaf
        if leaf.dtype == torch.bool:
            return torch.randint(0, 2, leaf.shape, generator=generator).bool().to(leaf.device)
        order = torch.randint(0, leaf.numel(), leaf.shape, generator=generator)
        return leaf.detach().reshape(-1)[order.to(leaf.device)]

    def little(leaf: Any) -> Any:
        if not isinstance(leaf, Tensor) or leaf.dtype.is_floating_point or leaf.dtype.is_complex:
            return shuffled(leaf)
        high = 2 if leaf.dtype == torch.bool else 3
        return torch.randint(0, high, leaf.shape, generator=generator).to(leaf.dtype)

    return [shuffled, little, little] if small else [shuffled, shuffled]
