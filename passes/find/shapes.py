"""Whether the operands of one attention fit together."""

from __future__ import annotations

from typing import Any

import torch
from torch.fx.experimental.symbolic_shapes import free_unbacked_symbols
from torch.utils._python_dispatch import is_traceable_wrapper_subclass

from sparse_compile.passes.find import values
from sparse_compile.sites.operands import MaskOperand, Operand
from sparse_compile.sites.site import Refused

_DTYPES = (torch.float32, torch.float16, torch.bfloat16)
_CAST = "cast q, k and v to float32, float16 or bfloat16"


def sizes(operand: Operand) -> dict[str, Any]:
    """The size of each axis of an operand; absent axes have size one, two may be one."""
    own = dict(zip(operand.axes, values.shape(operand.node), strict=True))
    if "bh" in own:
        return {"b": operand.split[0], "h": operand.split[1], **own}
    whole = {axis: own.get(f"{axis}1", 1) * own.get(f"{axis}2", 1) for axis in "bh"}
    return {**whole, **own}


def check_operands(q: Operand, k: Operand, v: Operand) -> None:
    """That shapes, heads and dtypes are those of one attention.

    Raises:
        Refused: they are not.
    """
    for operand in (q, k, v):
        _check_dtype(operand)
    query, key, value = sizes(q), sizes(k), sizes(v)
    for name, other in (("k", key), ("v", value)):
        if values.differ(query["b"], other["b"]):
            raise Refused(
                f"{name} has batch size {other['b']} and q has {query['b']}",
                f"expand {name} to the batch size of q",
            )
    if not heads_agree(k, v):
        raise Refused(
            f"k has {key['h']} heads and v has {value['h']}", "give both the same number of heads"
        )
    if not _divides(key["h"], query["h"]):
        raise Refused(f"q has {query['h']} heads, not a multiple of the {key['h']} of k and v")
    for name, features in (("q and k have", query["d"]), ("v has", value["d"])):
        if isinstance(features, int) and features == 0:
            raise Refused(f"{name} no features", "give q, k and v at least one feature")
    if values.differ(query["d"], key["d"]) or values.differ(key["n"], value["n"]):
        raise Refused("the shapes of q, k and v do not fit together")


def heads_agree(k: Operand, v: Operand) -> bool:
    """Whether k and v have the same number of heads."""
    return not values.differ(sizes(k)["h"], sizes(v)["h"])


def check_query(q: Operand, score_shape: tuple[Any, ...], score_axes: tuple[str, ...]) -> None:
    """That q is not broadcast: it has the batch size and the heads of the scores.

    Raises:
        Refused: it is.
    """
    have = sizes(q)
    for axis, size in zip(score_axes[:-2], score_shape[:-2], strict=True):
        if values.differ(have[axis], size):
            raise Refused(
                "q is broadcast over batches or heads of k", "expand q to the shape of the output"
            )


def check_masks(masks: tuple[MaskOperand, ...], score_shape: tuple[Any, ...]) -> None:
    """That each mask broadcasts to the scores and does not enlarge them.

    Raises:
        Refused: one does not.
    """
    whole = score_shape
    for mask in masks:
        shape, score_shape = values.shape(mask.node), mask.sizes or whole
        fits = len(shape) <= len(score_shape)
        for size, score in zip(reversed(shape), reversed(score_shape), strict=False):
            fits = fits and (values.same(size, 1) or not values.differ(size, score))
        if not fits:
            raise Refused(
                f"a mask of shape {_show(shape)} does not broadcast to the scores' "
                f"{_show(score_shape)}",
                "give q the batch size and heads of the mask",
            )


def check_output_dtype(output: Operand) -> None:
    """That kernels exist for the dtype of the output.

    Raises:
        Refused: they do not.
    """
    dtype = values.dtype(output.node)
    if dtype not in _DTYPES:
        raise Refused(f"attention in {values.short_dtype(dtype)} is not supported", _CAST)


def head_dim(q: Operand) -> int:
    """The number of features of q and k; a symbol gets a guard: kernels are generated for each.

    Raises:
        Refused: it depends on data.
    """
    size = sizes(q)["d"]
    if free_unbacked_symbols(size):
        raise Refused("the head dimension depends on data", "make it a constant")
    return int(size)


def _check_dtype(operand: Operand) -> None:
    example = values.tensor(operand.node)
    if example is not None and not _is_plain(example):
        raise Refused(
            f"`{operand.node.name}` is a {type(example).__name__}, not a plain tensor",
            "pass plain tensors",
        )
    if example is not None and example.is_meta:
        raise Refused(
            f"`{operand.node.name}` is on the meta device, which holds no data",
            "move the model and its inputs to the CPU or a GPU",
        )
    dtype = values.dtype(operand.node)
    if dtype not in _DTYPES:
        raise Refused(f"`{operand.node.name}` is {values.short_dtype(dtype)}", _CAST)


def _is_plain(example: torch.Tensor) -> bool:
    """Whether a tensor is neither nested nor a subclass that wraps others, such as DTensor."""
    return not (example.is_nested or is_traceable_wrapper_subclass(example))


def _divides(key_heads: Any, query_heads: Any) -> bool:
    if values.same(key_heads, 0):
        return False
    return values.same(query_heads % key_heads, 0) or not values.differ(query_heads, key_heads)


def _show(shape: tuple[Any, ...]) -> str:
    return "[" + ", ".join(str(size) for size in shape) + "]"
