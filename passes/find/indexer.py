"""Where the indices of a selection come from: a top-k of an indexer, or of an attention's scores.

An indexer scores every key for every query, ``sum_h w_h * relu(q_h . k)``, and keeps the best. Its
scores are the one tensor [Nq, Nkv] that attention over selected keys would leave in the program. An
attention's own scores, of which it keeps the best, take their place.
"""

from __future__ import annotations

from collections.abc import Collection, Sequence

import torch
from torch.fx import Node

from sparse_compile.passes.find import values
from sparse_compile.passes.find.block_scores import find_block_scores
from sparse_compile.passes.find.canonical import canonical, op_name, where
from sparse_compile.passes.find.chain import (
    READS_NO_VALUES,
    UNMASKED,
    Chain,
    not_an_indexer,
    operand_of,
)
from sparse_compile.passes.find.dataflow import Dataflow, breadth_first
from sparse_compile.sites.operands import Operand, Scope
from sparse_compile.sites.site import (
    AttentionSite,
    IndexerSite,
    LiftedMask,
    Reached,
    Refused,
    Rejection,
    ScoringSite,
)
from sparse_compile.spec.indexer import IndexerSpec


class RankedChain(Chain):
    """A chain of which a top-k keeps the best.

    Attributes:
        index: the indices of the top-k, or the values that others reach.
        reached: how, if so.
        topk: the top-k.
        most, largest, is_sorted: its arguments.
    """

    def __init__(
        self, index: Node, scope: Scope, reached: Reached | None, others: Collection[Node] = ()
    ) -> None:
        super().__init__(scope, others)
        self.index, self.reached = index, reached
        (self.topk,) = index.all_input_nodes

    def check_operands(self, operands: Sequence[Operand], last: Node) -> None:
        """As for every chain; what others reach is computed later than the top-k was."""
        super().check_operands(operands, last)
        changed = [o.node.name for o in operands if self.flow.is_mutated(o.node)]
        if self.reached is not None and changed:
            raise Refused(f"`{changed[0]}` is overwritten")

    def ranked(self) -> Node:
        """The scores that the top-k is of.

        Raises:
            Refused: something else reads what it returns, or it runs over another axis.
        """
        topk = self.topk
        if any(user.users for user in topk.users if user is not self.index):
            raise Refused("its values are read, too")
        call = canonical(topk)
        if call is None:
            raise Refused("it is called in an unknown way")
        given = call.args
        if given["dim"] not in (-1, len(values.shape(given["input"])) - 1):
            raise Refused("it does not run over the keys")
        self.most, self.largest, self.is_sorted = given["k"], given["largest"], given["sorted"]
        if not (isinstance(self.largest, bool) and isinstance(self.is_sorted, bool)):
            raise Refused("its order is known only at run time")
        if self.reached is None:
            return self.taken(given["input"], topk)
        if not (self.largest if self.reached.least else self.is_sorted):
            raise Refused("which of its values is the last of the best is not known")
        comparison = _only_comparison(self.index, self.flow)
        self.others.add(comparison)
        scores = self.taken(given["input"], topk)
        sides = comparison.all_input_nodes
        if [self.flow.current(n, comparison) for n in sides].count(scores) != 1:
            raise Refused("its values are not compared with the scores that they are of")
        return scores


def _own_scores(chain: RankedChain) -> IndexerSite:
    """The scores that a top-k is taken of, and that become the weights of an attention.

    ``scores.masked_fill(scores < scores.topk(k).values[..., -1:], -inf).softmax(-1)`` and the same
    by index, after https://arxiv.org/abs/1912.11637: the scores have to be computed to find the
    best, but only those of some queries at a time.

    Raises:
        Refused: they are made in another way, or something else reads them, too.
    """
    before, product = chain.steps(chain.masked(chain.ranked()))
    q, k = chain.by_head(product)
    chain.check_operands((q, k), chain.topk)
    scores = chain.as_attention(Operand(chain.index), q, k, ("b", "h", "q", "kv"))
    spec = IndexerSpec(before, (), False, *UNMASKED, chain.largest, chain.is_sorted)
    return IndexerSite(scores, None, chain.most, spec, chain.reached)


def _only_comparison(ranked: Node, flow: Dataflow) -> Node:
    """The node that compares ``ranked``, or what is made of it.

    Raises:
        Refused: there are several, or something else reads the values, or overwrites them.
    """
    found: list[Node] = []
    for node in breadth_first(ranked, _readers):
        example = node.meta.get("example_value")
        if values.dtype(node) is torch.bool:
            found.append(node)
        elif not (values.is_float(node) or isinstance(example, (tuple, list))):
            raise Refused("its values are read, too")
        elif flow.is_mutated(node):
            raise Refused("its values are overwritten")
    if len(found) != 1:
        raise Refused("its values are read, too")
    return found[0]


def _readers(node: Node) -> list[Node]:
    """What reads the values of a node, but for comparisons."""
    readers = [] if values.dtype(node) is torch.bool else list(node.users)
    return [reader for reader in readers if op_name(reader) not in READS_NO_VALUES]


def find_indexer(site: AttentionSite, lifted: LiftedMask) -> ScoringSite | Rejection | None:
    """What scores the keys that a mask selects: an indexer, or the attention itself.

    Args:
        site: the attention.
        lifted: its mask.

    Returns:
        why its top-k is none, or must stay, if it is not one; None for a mask that selects no keys
        by a top-k, or by one whose scores are not of all keys.
    """
    if lifted.selection is None or not lifted.selection.best:
        return None
    assert lifted.scope is not None
    source, best = lifted.selection.source, lifted.selection.best
    try:
        reached = lifted.selection.reached
        ranked = source if reached is None else reached.values
        if site.ranked is not None and ranked is not None:
            return _own_scores(RankedChain(ranked, lifted.scope, reached, site.region))
        pooled = find_block_scores(best, lifted.scope)
        if pooled is not None or ranked is None:
            return pooled
        return _match(RankedChain(ranked, lifted.scope, reached))
    except Refused as refused:
        return refused.at(where(best[0]), best[0])


def _match(chain: RankedChain) -> IndexerSite:
    """The indexer of which the top-k of a chain keeps the best, from the top-k backwards.

    Raises:
        Refused: it is not one, or one that something else reads.
    """
    after, scores = chain.steps(chain.masked(chain.ranked()))
    call = canonical(scores)
    is_product = call is None or call.op != "sum"
    relu, w, axes = (_weighted if is_product else _summed)(scores, chain)
    before, product = chain.steps(_inside(relu, chain))
    q, k, meaning = chain.factors(product, axes, "q [B, Nq, H, D] and k [B, Nkv, D]")
    q, k = operand_of(q, meaning, "bnhd"), operand_of(k, meaning, "bdt")
    before_q, before_k = _narrowed(q), _narrowed(k)
    single = before_q is not None and before_k is not None
    if before_q is not None and before_k is not None:
        q, k = before_q, before_k
    chain.check_operands((q, k, w), chain.topk)
    site = chain.as_attention(Operand(chain.index, ("b", "n", "d")), q, k, ("b", "q", "kv"))
    flags = chain.largest, chain.is_sorted, single
    spec = IndexerSpec(before, after, is_product, *UNMASKED, *flags)
    return IndexerSite(site, w, chain.most, spec, chain.reached)


def _inside(relu: Node, chain: Chain) -> Node:
    """What a relu is of."""
    call = canonical(relu)
    if call is None or call.op != "relu" or call.args["inplace"]:
        raise not_an_indexer()
    return chain.taken(call.args["input"], relu)


#: The relu of the scores of each head, the weights, and what the axes of the former are, among
#: ``b``, ``n`` (queries), ``t`` (keys) and ``h``.
_Weighted = tuple[Node, Operand, tuple[str, ...]]


def _weighted(node: Node, chain: Chain) -> _Weighted:
    """The sum over heads, as a product with the weights."""
    product = chain.contraction(node)
    sides, out = (product.left, product.right), product.out
    for each, weights in (sides, sides[::-1]):
        if op_name(each.node) != "relu":
            continue
        (head,) = product.summed
        tokens = [letter for letter in each.axes if letter != head]
        if len(tokens) != 3 or (out[0], out[-1]) != (tokens[0], tokens[-1]):
            break
        meaning = {**dict(zip(tokens, "bnt", strict=True)), head: "h"}
        w = operand_of(weights, meaning, "bnh")
        return chain.taken(each.node, node), w, each.renamed(meaning).axes
    raise not_an_indexer()


def _summed(node: Node, chain: Chain) -> _Weighted:
    """The sum over heads, as a sum of products with the weights."""
    call = canonical(node)
    assert call is not None
    dims, rest = call.args["dim"], (call.args["keepdim"], call.args["dtype"])
    dim = dims[0] if isinstance(dims, (list, tuple)) and len(dims) == 1 else dims
    product = canonical(call.args["input"])
    if product is None or product.op != "mul" or product.in_place:
        raise not_an_indexer()
    factors = product.args["input"], product.args["other"]
    ranks = {len(values.shape(n)) if isinstance(n, Node) else 0 for n in factors}
    if rest != (False, None) or not isinstance(dim, int) or ranks != {4}:
        raise not_an_indexer()
    axes = ["b", "n", "t"]
    axes.insert(dim % 4, "h")
    for each, weights in (factors, factors[::-1]):
        if op_name(each) == "relu":
            w = operand_of(Operand(weights, tuple(axes)), dict(zip(axes, axes, strict=True)), "bnh")
            chain.taken(call.args["input"], node)
            return chain.taken(each, call.args["input"]), w, tuple(axes)
    raise not_an_indexer()


def _narrowed(operand: Operand) -> Operand | None:
    """What an operand was before it was made fp32 from half precision; None if it was not."""
    node, axes = operand.node, operand.axes
    while (call := canonical(node)) is not None and call.op == "unsqueeze":
        dim = call.args["dim"]
        if not isinstance(dim, int) or axes[dim] != "1":
            return None
        dim %= len(axes)
        node, axes = call.args["input"], axes[:dim] + axes[dim + 1 :]
    if call is None or call.op != "cast" or values.dtype(node) is not torch.float32:
        return None
    before = call.args["input"]
    is_half = values.dtype(before) in (torch.float16, torch.bfloat16)
    return Operand(before, axes) if is_half else None
