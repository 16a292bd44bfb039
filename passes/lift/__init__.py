"""lift_mask: from a mask in a captured graph to a predicate over (b, h, q, kv), checked."""

from sparse_compile.passes.lift.driver import LiftCache, lift_mask

__all__ = ["LiftCache", "lift_mask"]
