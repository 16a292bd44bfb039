"""The passes, in the order in which they run."""

from sparse_compile.passes.annotations import (
    check_fit,
    promised_mask,
    restricted_mask,
    selected_mask,
    with_annotation,
)
from sparse_compile.passes.decide.cheapest import choose_cheapest
from sparse_compile.passes.decide.layout import (
    choose_indexer,
    choose_layout,
    choose_ranking,
    choose_selection,
    why_no_lists,
)
from sparse_compile.passes.dense_tables import remember_given
from sparse_compile.passes.find import find_attention, find_indexer
from sparse_compile.passes.lift import LiftCache, lift_mask
from sparse_compile.passes.rewrite.held_layouts import hold_layouts
from sparse_compile.passes.rewrite.rewriter import Rewriter
from sparse_compile.passes.rewrite.share_lists import share_lists
from sparse_compile.sites.plan import Plan
from sparse_compile.sites.site import Rejection

Decision = Plan | Rejection

__all__ = [
    "Decision",
    "LiftCache",
    "Plan",
    "Rejection",
    "Rewriter",
    "check_fit",
    "choose_cheapest",
    "choose_indexer",
    "choose_layout",
    "choose_ranking",
    "choose_selection",
    "find_attention",
    "find_indexer",
    "hold_layouts",
    "lift_mask",
    "promised_mask",
    "remember_given",
    "restricted_mask",
    "selected_mask",
    "share_lists",
    "why_no_lists",
    "with_annotation",
]
