"""rewrite_indexer: operators in the place of what scores keys, so that no scores of all exist."""

from __future__ import annotations

import operator
from typing import Any

from torch.fx import Node

from sparse_compile.ops.indexer import BLOCK_SCORES, INDEXED_TOPK
from sparse_compile.ops.kept import INDEXED_KEPT
from sparse_compile.passes.graph_edit import Inserter, with_axes
from sparse_compile.passes.rewrite.tables import RealisedTables, realise
from sparse_compile.sites.operands import Operand
from sparse_compile.sites.plan import Indexer
from sparse_compile.sites.site import AttentionSite, BlockScoresSite, IndexerSite


def replace_indexer(indexer: Indexer, realised: RealisedTables) -> None:
    """The indices that an indexer keeps, or the scores of blocks, without those of all keys."""
    site, old = indexer.site, indexer.site.scores.output.node
    gm = site.scores.scope.gm
    insert = Inserter(gm, old)
    if isinstance(site, BlockScoresSite):
        tables, sizes = realise(indexer.lifted, site.scores.scope, realised)
        blocks, operands = insert.size(site.view, 3), _by_head(insert, site.scores)
        new = insert.call(BLOCK_SCORES, *operands, tables, sizes, blocks, indexer.spec.text)
    else:
        new = insert.call(INDEXED_TOPK, *_ranking(insert, site, indexer, realised))
    old.replace_all_uses_with(new)
    gm.graph.erase_node(old)


def replace_lists(lists: tuple[Node, ...], indexer: Indexer, realised: RealisedTables) -> None:
    """The lists of keys whose scores reach a threshold, without the scores of all keys.

    Args:
        lists: the index and the count that a call of ``KEPT_SELECTION`` makes of these scores.
        indexer: what scores the keys.
        realised: the tables of the graph.
    """
    site = indexer.site
    assert isinstance(site, IndexerSite)
    assert site.reached is not None
    scope = site.scores.scope
    (call,) = lists[0].all_input_nodes
    _, fixed, *seen, _, mask = call.args
    insert = Inserter(scope.gm, lists[0])
    reaches = f"{'least ' * site.reached.least}{site.reached.comparison}"
    ranking = _ranking(insert, site, indexer, realised)
    made = insert.call(INDEXED_KEPT, *ranking, reaches, fixed, *seen, mask)
    new = [insert.call(operator.getitem, made, part) for part in (0, 1)]
    for before, after in zip(lists, new, strict=True):
        before.replace_all_uses_with(after)
        scope.gm.graph.erase_node(before)
    scope.gm.graph.erase_node(call)


def _ranking(
    insert: Inserter, site: IndexerSite, indexer: Indexer, realised: RealisedTables
) -> tuple[Any, ...]:
    """What an operator that ranks scores takes."""
    tables, sizes = realise(indexer.lifted, site.scores.scope, realised)
    if site.w is None:
        operands: tuple[Node | None, ...] = (*_by_head(insert, site.scores), None)
    else:
        axes = ((site.scores.q, "bnhd"), (site.scores.k, "bdn"), (site.w, "bnh"))
        operands = tuple(_arranged(insert, operand, order) for operand, order in axes)
    return (*operands, tables, sizes, site.most, indexer.spec.text)


def _by_head(insert: Inserter, scores: AttentionSite) -> tuple[Node, Node]:
    """q and k as [B, H, Nq, D] and [B, H or 1, D, Nkv]."""
    return _arranged(insert, scores.q, "bhnd"), _arranged(insert, scores.k, "bhdn")


def _arranged(insert: Inserter, operand: Operand, axes: str) -> Node:
    """An operand of an indexer with its axes in order, without a gradient."""
    return with_axes(insert.method, insert.method("detach", operand.node), operand.axes, axes)
