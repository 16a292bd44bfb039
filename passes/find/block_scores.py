"""The highest score of every block of keys, which an indexer of blocks keeps the best of.

``amax(view(q @ k.mT, [..., blocks, size]), -1)`` holds one number for a block; the scores that it
is computed from, [Nq, Nkv], need not exist. Nothing else of the program has to be understood: what
becomes of these numbers, up to the top-k, stays as it is.
"""

from __future__ import annotations

from collections.abc import Sequence

from torch.fx import Node

from sparse_compile.passes.find import values
from sparse_compile.passes.find.canonical import canonical, is_reshape, op_name, source
from sparse_compile.passes.find.chain import UNMASKED, Chain
from sparse_compile.passes.find.contraction import contraction
from sparse_compile.passes.find.dataflow import breadth_first
from sparse_compile.passes.mutation import written_inputs
from sparse_compile.sites.operands import Operand, Scope
from sparse_compile.sites.site import BlockScoresSite, Refused
from sparse_compile.spec.indexer import BlockScoresSpec

#: A top-k and the products that it is made of are fewer steps apart.
_FAR = 17


def find_block_scores(best: Sequence[Node], scope: Scope) -> BlockScoresSite | None:
    """The scores of blocks that a top-k is taken of.

    Args:
        best: the top-k's of which an index is made.
        scope: where they stand.

    Returns:
        None if there are none.

    Raises:
        Refused: scores of keys are pooled, in a way that must stay.
    """
    pools = [pool for topk in best for pool in _pools(topk)]
    if len(pools) != 1:
        return None
    (pool,), chain = pools, Chain(scope)
    scores, view, size = _blocks(pool, chain)
    scores, padding = _unpadded(scores, chain)
    before, product = chain.steps(chain.masked(scores))
    q, k = chain.by_head(product)
    chain.check_operands((q, k), pool)
    _check_gradient(pool)
    site = chain.as_attention(Operand(pool), q, k, ("b", "h", "q", "kv"))
    spec = BlockScoresSpec(size, before, *UNMASKED, padding)
    return BlockScoresSite(site, view, spec)


def _pools(topk: Node) -> list[Node]:
    """The maxima over blocks of keys that the scores of a top-k are made of."""
    calls = [(node, _maximum(node)) for node in _behind(topk)]
    return [
        node
        for node, call in calls
        if call is not None and any(contraction(behind) for behind in _behind(call))
    ]


def _maximum(node: Node) -> Node | None:
    """The call of which a node is the maxima: ``amax(x, dim)`` or ``max(x, dim).values``."""
    if op_name(node) == "amax":
        return node
    call = node.args[0] if op_name(node) == "getitem" and node.args[1] == 0 else None
    if not isinstance(call, Node) or op_name(call) != "max":
        return None
    return None if any(user.users for user in call.users if user is not node) else call


def _behind(last: Node) -> list[Node]:
    """The floating tensors that a node is made of, up to products and maxima, nearest first."""

    def following(node: Node) -> list[Node]:
        ends = node is not last and (_maximum(node) or contraction(node))
        return [] if ends else [n for n in node.all_input_nodes if values.is_float(n)]

    return list(breadth_first(last, following, _FAR))[1:]


def _blocks(pool: Node, chain: Chain) -> tuple[Node, Node, int]:
    """The scores by key, of which ``pool`` holds the highest of each block.

    Returns:
        them; the same with an axis for the blocks; keys in a block.
    """
    maximum = _maximum(pool)
    assert maximum is not None
    call = canonical(maximum)
    if call is None:
        raise _other("not as the maximum over one axis")
    dim = call.args["dim"]
    dim = dim[0] if isinstance(dim, (tuple, list)) and len(dim) == 1 else dim
    view = chain.taken(call.args["input"], maximum)
    if dim not in (-1, 4) or call.args["keepdim"] or not is_reshape(view):
        raise _other("they are not pooled over blocks of the last axis")
    *rows, _, size = values.shape(view)
    scores = chain.taken(source(view), view)
    if len(rows) != 3 or not values.same_shape(tuple(rows), values.shape(scores)[:-1]):
        raise _other("they are not [B, H, Nq, Nkv]")
    known = values.number(size)
    if known is None:
        raise _other("the size of a block is known only at run time")
    return scores, view, int(known)


def _unpadded(node: Node, chain: Chain) -> tuple[Node, float]:
    """The scores before keys were added to make the last block whole, and the score of these."""
    call = canonical(node)
    if call is None or call.op != "pad":
        return node, float("-inf")
    amounts, value = call.args["pad"], values.number(call.args["value"] or 0.0)
    first = isinstance(amounts, (tuple, list)) and len(amounts) == 2 and amounts[0] == 0
    if not first or call.args["mode"] != "constant" or value is None:
        raise _other("they are padded in several places")
    return chain.taken(call.args["input"], node), value


def _check_gradient(pool: Node) -> None:
    """Scores that only decide which blocks are kept need no gradient.

    Raises:
        Refused: what is made of them may have one.
    """
    value = values.tensor(pool)
    if value is not None and not value.requires_grad:
        return
    seen = list(breadth_first(pool, lambda node: filter(_may_have_gradient, node.users)))
    for user in (user for node in seen for user in node.users):
        others = [target for target in written_inputs(user) if target not in seen]
        opaque = user.op == "call_module" or any(n.op == "get_attr" for n in user.all_input_nodes)
        if others or opaque or user.op == "output":
            raise _other(f"`{op_name(user)}` reads their values")


def _may_have_gradient(node: Node) -> bool:
    """Whether a node is a floating tensor, or several of which one is."""
    return values.is_float(node) or isinstance(node.meta.get("example_value"), (tuple, list))


def _other(why: str) -> Refused:
    return Refused(f"it pools scores of keys, but {why}")
