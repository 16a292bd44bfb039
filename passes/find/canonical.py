"""One name and one argument list for each meaning, however the program spelled it."""

from __future__ import annotations

import builtins
import operator
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch.fx import Node

from sparse_compile.passes.find import values

SDPA: Callable[..., Any] = F.scaled_dot_product_attention


@dataclass(frozen=True)
class Call:
    """A node by its meaning.

    Attributes:
        op: the meaning: ``matmul``, ``einsum``, ``baddbmm``, ``softmax``, ``mul``, ``div``,
            ``add``, ``sub``, ``tanh``, ``masked_fill``, ``where``, ``cat``, ``amax``, ``cast``,
            ``copy``, ``dropout``, ``sdpa``.
        args: the arguments by name, defaults filled in.
        in_place: whether it overwrites ``args["input"]``.
    """

    op: str
    args: dict[str, Any]
    in_place: bool = False


@dataclass(frozen=True)
class _Spelling:
    """Some ways to write one op that share a parameter list.

    ``parameters`` are space separated; ``a|b`` are two keywords of one parameter, ``a=1`` a
    default, ``*a`` takes the remaining positional arguments, and ``**`` ignores what is left.
    """

    op: str
    parameters: str
    functions: tuple[Any, ...] = ()
    methods: tuple[str, ...] = ()
    in_place: bool = False


_SPELLINGS = (
    _Spelling(
        "matmul",
        "input|self other|mat2|tensor2",
        (torch.matmul, torch.bmm, torch.mm, torch.linalg.matmul, operator.matmul),
        ("matmul", "bmm", "mm", "__matmul__"),
    ),
    _Spelling("einsum", "equation *operands", (torch.einsum,)),
    _Spelling("baddbmm", "input batch1 batch2 beta=1 alpha=1", (torch.baddbmm,), ("baddbmm",)),
    _Spelling("softmax", "input dim|axis=None _stacklevel=3 dtype=None", (F.softmax,)),
    _Spelling(
        "softmax",
        "input dim|axis=None dtype=None",
        (torch.softmax, torch.special.softmax),
        ("softmax",),
    ),
    _Spelling(
        "mul",
        "input other",
        (operator.mul, torch.mul, torch.multiply),
        ("mul", "multiply", "__mul__", "__rmul__"),
    ),
    _Spelling("mul", "input other", (operator.imul,), ("mul_", "multiply_"), in_place=True),
    _Spelling(
        "div",
        "input other rounding_mode=None",
        (operator.truediv, torch.div, torch.divide, torch.true_divide),
        ("div", "divide", "true_divide", "__truediv__"),
    ),
    _Spelling(
        "div",
        "input other rounding_mode=None",
        (operator.itruediv,),
        ("div_", "divide_", "true_divide_"),
        in_place=True,
    ),
    _Spelling(
        "add",
        "input other alpha=1",
        (operator.add, torch.add),
        ("add", "__add__", "__radd__"),
    ),
    _Spelling("add", "input other alpha=1", (operator.iadd,), ("add_",), in_place=True),
    _Spelling("sub", "input other alpha=1", (operator.sub, torch.sub), ("sub", "__sub__")),
    _Spelling("tanh", "input", (torch.tanh, F.tanh), ("tanh",)),
    _Spelling("tanh", "input", (torch.tanh_,), ("tanh_",), in_place=True),
    _Spelling("cat", "tensors dim|axis=0", (torch.cat, torch.concat, torch.concatenate)),
    _Spelling("amax", "input dim|axis keepdim=False", (torch.amax,), ("amax",)),
    _Spelling("masked_fill", "input mask value", (torch.masked_fill,), ("masked_fill",)),
    _Spelling("masked_fill", "input mask value", (), ("masked_fill_",), in_place=True),
    _Spelling("where", "condition input|self other", (torch.where,)),
    _Spelling("where", "input condition other", (), ("where",)),
    _Spelling(
        "cast",
        "input **",
        (),
        ("to", "type", "type_as", "float", "half", "bfloat16", "double"),
    ),
    _Spelling("copy", "input memory_format=None", (torch.clone,), ("contiguous", "clone")),
    _Spelling("dropout", "input p=0.5 training=True inplace=False", (F.dropout,)),
    _Spelling("dropout", "input p training|train", (torch.dropout,)),
    _Spelling(
        "sdpa",
        "query key value attn_mask=None dropout_p=0.0 is_causal=False scale=None enable_gqa=False",
        (SDPA,),
    ),
)

_BY_FUNCTION = {function: row for row in _SPELLINGS for function in row.functions}
_BY_METHOD = {method: row for row in _SPELLINGS for method in row.methods}

_RESHAPES = frozenset("view reshape flatten unflatten unsqueeze squeeze view_as reshape_as".split())
_EXPANDS = frozenset("expand expand_as broadcast_to repeat tile".split())
_PERMUTES = frozenset("transpose swapaxes swapdims permute movedim moveaxis t mT T".split())


def canonical(node: object) -> Call | None:
    """The meaning of a node; None for an op, or a way to call one, that is not in the table."""
    if not isinstance(node, Node):
        return None
    row = None
    if node.op == "call_function":
        row = _BY_FUNCTION.get(node.target)
    elif node.op == "call_method":
        row = _BY_METHOD.get(str(node.target))
    if row is None:
        return None
    bound = _bind(row.parameters, node.args, node.kwargs)
    return None if bound is None else Call(row.op, bound, row.in_place)


def _bind(parameters: str, args: tuple[Any, ...], kwargs: dict[str, Any]) -> dict[str, Any] | None:
    positional, keywords = list(args), dict(kwargs)
    bound: dict[str, Any] = {}
    for parameter in parameters.split():
        if parameter == "**":
            return bound
        if parameter.startswith("*"):
            bound[parameter[1:]] = tuple(positional)
            positional = []
            continue
        names, _, default = parameter.partition("=")
        given = [name for name in names.split("|") if name in keywords]
        key = names.split("|")[0]
        if positional:
            bound[key] = positional.pop(0)
        elif given:
            bound[key] = keywords.pop(given[0])
        elif default:
            bound[key] = _DEFAULTS[default]
        else:
            return None
    return None if positional or keywords else bound


_DEFAULTS = {
    "None": None, "0": 0, "0.0": 0.0, "0.5": 0.5, "1": 1, "3": 3, "True": True, "False": False,
}  # fmt: skip


def op_name(node: Node) -> str:
    """How a person would call the node's op: ``tanh``, ``cat``, ``setitem``."""
    if node.op == "call_function":
        if node.target is builtins.getattr:
            return str(node.args[1])
        return str(getattr(node.target, "__name__", node.target))
    return "return" if node.op == "output" else str(node.target)


def source(node: Node) -> Node | None:
    """The tensor that a unary view, cast or copy starts from."""
    first = node.args[0] if node.args else node.kwargs.get("input")
    return first if isinstance(first, Node) and values.tensor(first) is not None else None


def is_reshape(node: Node) -> bool:
    """Whether the node only regroups axes, in row-major order, keeping every element."""
    start, here = source(node), values.tensor(node)
    if start is None or here is None or here.dtype != values.tensor(start).dtype:  # type: ignore[union-attr]
        return False
    if node.target is operator.getitem:
        index = node.args[1] if isinstance(node.args[1], tuple) else (node.args[1],)
        return all(i is None or i is Ellipsis or i == slice(None) for i in index)
    return _is_call(node) and op_name(node) in _RESHAPES


def is_expand(node: Node) -> bool:
    """Whether the node only repeats axes of size one (judge which by the shapes)."""
    return _is_call(node) and op_name(node) in _EXPANDS and source(node) is not None


def permutation(node: Node) -> tuple[int, ...] | None:
    """The axes order of a transpose or permute, as for ``Tensor.permute``; None for other ops."""
    start = source(node) if _is_call(node) and op_name(node) in _PERMUTES else None
    if start is None:
        return None
    if any(isinstance(argument, Node) for argument in node.args[1:]):
        return None
    rank = len(values.shape(start))
    # Asking the op itself, on sizes that tell the axes apart, serves every way to write it.
    probe = torch.empty(tuple(range(2, rank + 2)), device="meta")
    rest, keywords = node.args[1:], {k: v for k, v in node.kwargs.items() if k != "input"}
    if node.op == "call_method":
        moved = getattr(probe, str(node.target))(*rest, **keywords)
    else:
        moved = node.target(probe, *rest, **keywords)  # type: ignore[operator]
    return tuple(size - 2 for size in moved.shape)


def _is_call(node: Node) -> bool:
    return node.op in ("call_function", "call_method")
