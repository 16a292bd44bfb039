"""The one comparison that the values of a ranking are for, if nothing else reads them."""

from __future__ import annotations

import torch
from torch.fx import Node

from sparse_compile.passes.find import values
from sparse_compile.passes.find.canonical import op_name
from sparse_compile.passes.find.chain import READS_NO_VALUES
from sparse_compile.passes.find.dataflow import Dataflow
from sparse_compile.passes.find.refusal import Refusal


def only_comparison(ranked: Node, flow: Dataflow) -> Node:
    """The node that compares ``ranked``, or what is made of it.

    Raises:
        Refusal: there are several, or something else reads the values, or overwrites them.
    """
    front, seen, found = [ranked], {ranked}, set[Node]()
    while front:
        node = front.pop()
        if flow.is_mutated(node):
            raise Refusal("its values are overwritten")
        for user in node.users:
            if op_name(user) in READS_NO_VALUES or user in seen:
                continue
            seen.add(user)
            example = user.meta.get("example_value")
            if isinstance(example, torch.Tensor) and example.dtype == torch.bool:
                found.add(user)
            elif values.is_float(user) or isinstance(example, (tuple, list)):
                front.append(user)
            else:
                raise Refusal("its values are read, too")
    if len(found) != 1:
        raise Refusal("its values are read, too")
    return found.pop()
