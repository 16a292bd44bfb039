"""One name and one argument list for each meaning, however the program spelled it."""

from __future__ import annotations

import ast
import builtins
import inspect
import operator
import os
import re
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch.fx import Node

from sparse_compile import errors
from sparse_compile.passes.find import values

SDPA: Callable[..., Any] = F.scaled_dot_product_attention


@dataclass(frozen=True)
class Call:
    """A node by its meaning.

    Attributes:
        op: the meaning: ``matmul``, ``einsum``, ``baddbmm``, ``softmax``, ``mul``, ``div``,
            ``add``, ``sub``, ``tanh``, ``masked_fill`` and so on.
        args: the arguments by name, defaults filled in.
        in_place: whether it overwrites ``args["input"]``.
    """

    op: str
    args: dict[str, Any]
    in_place: bool = False


_ALIASES = {
    "self": "input",
    "axis": "dim",
    "mat2": "other",
    "tensor2": "other",
    "train": "training",
}
"""Other keywords for the same parameters."""

_OVERWRITING = (operator.imul, operator.itruediv, operator.iadd, operator.isub)


class _Spelling:
    """Some ways to write one op that share a parameter list, such as ``input dim=None **rest``."""

    def __init__(
        self, op: str, parameters: str, functions: tuple[Any, ...], methods: str = ""
    ) -> None:
        self.op, self.targets = op, (*functions, *methods.split())
        self.signature = inspect.Signature([_parameter(word) for word in parameters.split()])


def _parameter(word: str) -> inspect.Parameter:
    name, _, default = word.partition("=")
    kinds = inspect.Parameter.POSITIONAL_OR_KEYWORD, inspect.Parameter.VAR_POSITIONAL
    kind = (*kinds, inspect.Parameter.VAR_KEYWORD)[name.count("*")]
    value = ast.literal_eval(default) if default else inspect.Parameter.empty
    return inspect.Parameter(name.lstrip("*"), kind, default=value)


_SPELLINGS = (
    _Spelling(
        "matmul",
        "input other",
        (torch.matmul, torch.bmm, torch.mm, torch.linalg.matmul, operator.matmul),
        "matmul bmm mm __matmul__",
    ),
    _Spelling("einsum", "equation *operands", (torch.einsum,)),
    _Spelling("baddbmm", "input batch1 batch2 beta=1 alpha=1", (torch.baddbmm,), "baddbmm"),
    _Spelling("softmax", "input dim=None _stacklevel=3 dtype=None", (F.softmax,)),
    _Spelling(
        "softmax", "input dim=None dtype=None", (torch.softmax, torch.special.softmax), "softmax"
    ),
    _Spelling(
        "mul",
        "input other",
        (operator.mul, operator.imul, torch.mul, torch.multiply),
        "mul mul_ multiply multiply_ __mul__ __rmul__",
    ),
    _Spelling(
        "div",
        "input other rounding_mode=None",
        (operator.truediv, operator.itruediv, torch.div, torch.divide, torch.true_divide),
        "div div_ divide divide_ true_divide true_divide_ __truediv__",
    ),
    _Spelling(
        "add",
        "input other alpha=1",
        (operator.add, operator.iadd, torch.add),
        "add add_ __add__ __radd__",
    ),
    _Spelling(
        "sub",
        "input other alpha=1",
        (operator.sub, operator.isub, torch.sub, torch.subtract),
        "sub sub_ subtract subtract_ __sub__",
    ),
    _Spelling("neg", "input", (operator.neg, torch.neg, torch.negative), "neg neg_ negative"),
    _Spelling("maximum", "input other", (torch.maximum,), "maximum"),
    _Spelling("maximum", "input other", (torch.clamp_min,), "clamp_min clamp_min_"),
    _Spelling("maximum", "input min", (torch.clamp, torch.clip), "clamp clamp_ clip clip_"),
    _Spelling("tanh", "input", (torch.tanh, torch.tanh_, F.tanh), "tanh tanh_"),
    _Spelling("exp", "input", (torch.exp,), "exp exp_"),
    _Spelling("sigmoid", "input", (torch.sigmoid, F.sigmoid), "sigmoid sigmoid_"),
    _Spelling("silu", "input inplace=False", (F.silu,)),
    _Spelling("abs", "input", (torch.abs, operator.abs), "abs abs_"),
    _Spelling("square", "input", (torch.square,), "square square_"),
    _Spelling("relu", "input inplace=False", (torch.relu, F.relu), "relu relu_"),
    _Spelling("sum", "input dim=None keepdim=False dtype=None", (torch.sum,), "sum"),
    _Spelling("cat", "tensors dim=0", (torch.cat, torch.concat, torch.concatenate)),
    _Spelling("max", "input dim keepdim=False", (torch.max,), "max"),
    _Spelling("amax", "input dim keepdim=False", (torch.amax,), "amax"),
    _Spelling("topk", "input k dim=-1 largest=True sorted=True", (torch.topk,), "topk"),
    _Spelling("pad", "input pad mode='constant' value=None", (F.pad, torch._C._nn.pad)),
    _Spelling("unsqueeze", "input dim", (torch.unsqueeze,), "unsqueeze"),
    _Spelling(
        "repeat_interleave",
        "input repeats dim=None output_size=None",
        (torch.repeat_interleave,),
        "repeat_interleave",
    ),
    _Spelling("masked_fill", "input mask value", (torch.masked_fill,), "masked_fill masked_fill_"),
    _Spelling("where", "condition input other", (torch.where,)),
    _Spelling("where", "input condition other", (), "where"),
    _Spelling("cast", "input *args **kwargs", (), "to type type_as float half bfloat16 double"),
    _Spelling("copy", "input memory_format=None", (torch.clone,), "contiguous clone"),
    _Spelling("softmax", "input dim half_to_float=False", (), "_softmax"),
    _Spelling("softmax", "input dim dtype=None", (torch._safe_softmax,)),
    _Spelling("cast", "input *args **kwargs", (), "_to_copy"),
    _Spelling("pad", "input pad value=0 mode='constant'", (), "constant_pad_nd"),
    _Spelling(
        "nan_to_num", "input nan=None posinf=None neginf=None", (torch.nan_to_num,), "nan_to_num"
    ),
    _Spelling("dropout", "input p=0.5 training=True inplace=False", (F.dropout,)),
    _Spelling("dropout", "input p training", (torch.dropout,)),
    _Spelling(
        "sdpa",
        "query key value attn_mask=None dropout_p=0.0 is_causal=False scale=None enable_gqa=False",
        (SDPA,),
    ),
)

_BY_TARGET: dict[Any, _Spelling] = {target: row for row in _SPELLINGS for target in row.targets}
#: Operators of ATen, which have the names and parameters of functions, or else of methods.
_BY_OPERATOR = {
    **{target: row for target, row in _BY_TARGET.items() if isinstance(target, str)},
    **{getattr(target, "__name__", ""): row for target, row in _BY_TARGET.items()},
}

_FRAME = re.compile(r'File "(?P<path>[^"]+)", line (?P<line>\d+), in (?P<function>.+)')
_TORCH = os.path.dirname(torch.__file__) + os.sep
_OURS = os.path.join(os.path.dirname(errors.__file__), "api") + os.sep
_KEPT = 3

_RESHAPES = frozenset(
    "view reshape flatten unflatten unsqueeze squeeze view_as reshape_as _unsafe_view".split()
)
_EXPANDS = frozenset("expand expand_as broadcast_to repeat tile".split())
_PERMUTES = frozenset("transpose swapaxes swapdims permute movedim moveaxis t mT T".split())


def canonical(node: object) -> Call | None:
    """The meaning of a node; None for an op, or a way to call one, that is not in the table."""
    if not isinstance(node, Node) or not _is_call(node):
        return None
    aten = _aten_name(node.target)
    row = _BY_TARGET.get(node.target) if aten is None else _BY_OPERATOR.get(aten)
    if row is None:
        return None
    named = {_ALIASES.get(name, name): value for name, value in node.kwargs.items()}
    try:
        bound = row.signature.bind(*node.args, **named)
    except TypeError:
        return None
    bound.apply_defaults()
    if row.op == "max" and values.tensor(bound.arguments["dim"]) is not None:
        return Call("maximum", {"input": node.args[0], "other": bound.arguments["dim"]})
    if row.op == "maximum" and "min" in bound.arguments:
        bound.arguments["other"] = bound.arguments.pop("min")
    name = op_name(node)
    in_place = node.target in _OVERWRITING or (name.endswith("_") and not name.endswith("__"))
    return Call(row.op, bound.arguments, in_place)


def op_name(node: Node) -> str:
    """How a person would call the node's op: ``tanh``, ``cat``, ``setitem``."""
    if node.op == "call_function":
        if node.target is builtins.getattr:
            return str(node.args[1])
        aten = _aten_name(node.target)
        return aten if aten is not None else str(getattr(node.target, "__name__", node.target))
    return "return" if node.op == "output" else str(node.target)


def _aten_name(target: object) -> str | None:
    """The name of an operator of ATen, as graphs from ``torch.export`` call; None for others."""
    if isinstance(target, torch._ops.OpOverload):
        target = target.overloadpacket
    if not isinstance(target, torch._ops.OpOverloadPacket):
        return None
    library, _, name = target._qualified_op_name.partition("::")
    return name if library == "aten" else None


def where(node: Node) -> tuple[str, ...]:
    """Where in the user's code a node comes from: three frames at most, innermost last.

    As in ``("model.py:41 in forward", ...)``, without torch's own and those of our API.
    """
    frames = _FRAME.finditer(node.meta.get("stack_trace") or "")
    lines = [
        f"{os.path.basename(frame['path'])}:{frame['line']} in {frame['function'].strip()}"
        for frame in frames
        if not frame["path"].startswith((_TORCH, _OURS))
    ]
    return tuple(lines[-_KEPT:])


def source(node: Node) -> Node | None:
    """The tensor that a unary view, cast or copy starts from."""
    first = node.args[0] if node.args else node.kwargs.get("input", node.kwargs.get("self"))
    return first if isinstance(first, Node) and values.tensor(first) is not None else None


def is_reshape(node: Node) -> bool:
    """Whether the node only regroups axes, in row-major order, keeping every element."""
    start, here = source(node), values.tensor(node)
    if start is None or here is None or here.dtype != values.tensor(start).dtype:  # type: ignore[union-attr]
        return False
    if node.target is operator.getitem:
        index = node.args[1] if isinstance(node.args[1], tuple) else (node.args[1],)
        return all(i is None or i is Ellipsis or i == slice(None) for i in index)
    if not _is_call(node):
        return False
    same = values.same_shape(tuple(values.shape(start)), tuple(values.shape(node)))
    return op_name(node) in _RESHAPES or (op_name(node) in _EXPANDS and same)


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
    rest = node.args[1:]
    keywords = {name: given for name, given in node.kwargs.items() if name not in ("input", "self")}
    if node.op == "call_method":
        moved = getattr(probe, str(node.target))(*rest, **keywords)
    else:
        moved = node.target(probe, *rest, **keywords)  # type: ignore[operator]
    return tuple(size - 2 for size in moved.shape)


def _is_call(node: Node) -> bool:
    return node.op in ("call_function", "call_method")
