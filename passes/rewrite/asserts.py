"""What ``torch.export`` asserts of tensors on the way, which are gone once it is rewritten."""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch.fx import Node


def drop_asserts(region: Iterable[Node]) -> None:
    """Erase what asserts dtypes and devices of some nodes: it would keep them alive."""
    for node in region:
        for user in list(node.users):
            if user.target is torch.ops.aten._assert_tensor_metadata.default:
                user.graph.erase_node(user)
