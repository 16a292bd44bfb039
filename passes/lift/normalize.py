"""From a slice of a Dynamo graph to a functional ATen graph: no writes, no vmap, few operators."""

from __future__ import annotations

import contextlib
import operator
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch.fx import GraphModule, Interpreter
from torch.fx.experimental.proxy_tensor import make_fx

from sparse_compile.passes.graph_edit import fake_mode_of
from sparse_compile.passes.lift.slice import VMAP, Slice, call_name
from sparse_compile.passes.mutation import IN_PLACE
from sparse_compile.sites.site import Refused

# In-place methods that change more than values.
_CHANGES_SHAPE = frozenset(
    "unsqueeze_ squeeze_ transpose_ t_ swapaxes_ swapdims_ resize_ resize_as_ set_ as_strided_ "
    "detach_ requires_grad_ rename_ share_memory_".split()
)
#: ``operator.ior`` and ``__ior__`` as ``operator.or_``, and so on.
_PLAIN = {
    name: getattr(operator, name[1:] + "_" if name in ("iand", "ior") else name[1:])
    for name in IN_PLACE
}


class _Replay(Interpreter):
    """Runs a graph with in-place operators as an operator and a ``copy_``.

    Functionalisation has no in-place version of some, and fails on others when sizes are symbolic.
    """

    def call_function(self, target: Any, args: Any, kwargs: Any) -> Any:
        name = getattr(target, "__name__", "")
        if name in _PLAIN and target is getattr(operator, name):
            return _copied(_PLAIN[name], *args, **kwargs)
        return super().call_function(target, args, kwargs)

    def call_method(self, target: Any, args: Any, kwargs: Any) -> Any:
        name = str(target)
        if name.startswith("__") and name.strip("_") in _PLAIN:
            return _copied(_PLAIN[name.strip("_")], *args, **kwargs)
        if name == "fill_diagonal_" and len(args) == 2 and not kwargs:
            return _fill_diagonal(*args)
        if name.endswith("_") and not name.startswith("_") and name not in _CHANGES_SHAPE:
            method = getattr(torch.Tensor, name[:-1], None)
            if method is not None:
                return _copied(method, *args, **kwargs)
        return super().call_method(target, args, kwargs)


def _copied(plain: Callable[..., Any], target: Any, *args: Any, **kwargs: Any) -> Any:
    result = plain(target, *args, **kwargs)
    return target.copy_(result) if isinstance(target, torch.Tensor) else result


def _fill_diagonal(target: torch.Tensor, value: Any) -> torch.Tensor:
    if target.dim() != 2:
        raise NotImplementedError("fill_diagonal_ of more than two dimensions")
    target.diagonal().fill_(value)
    return target


def normalise(part: Slice) -> GraphModule:
    """The slice as a functional ATen graph; node ``meta["val"]`` holds fake tensors and SymInts.

    Raises:
        Refused: when tracing fails, with the error.
    """
    gm = part.graph_module()
    fakes = [leaf.meta["example_value"] for leaf in part.leaves]
    nodes = (*part.leaves, *part.nodes, *part.outputs)
    try:
        with fake_mode_of(nodes), torch.no_grad(), functorch_levels_restored():
            if any(call_name(node) == VMAP for node in part.nodes):
                # The recorded vmap levels count from one: resolve them before functionalize,
                # which takes a level itself.
                gm = make_fx(_Replay(gm).run)(*fakes)
            traced = make_fx(torch.func.functionalize(_Replay(gm).run))(*fakes)
    except Exception as error:  # Tracing runs the user's operators: anything can be raised.
        message = str(error).strip().splitlines() or [""]
        raise Refused(
            f"the mask's computation cannot be traced ({type(error).__name__}: {message[0]})"
        ) from error
    traced.graph.eliminate_dead_code()
    return traced


@contextlib.contextmanager
def functorch_levels_restored() -> Iterator[None]:
    """Close the vmap levels that a failed replay leaves open; torch has no public way to."""
    depth = torch._C._functorch.get_dynamic_layer_stack_depth()
    try:
        yield
    finally:
        if torch._C._functorch.get_dynamic_layer_stack_depth() > depth:
            torch._C._functorch.pop_dynamic_layer_stack_and_undo_to_depth(depth)
