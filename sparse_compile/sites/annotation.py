"""Annotation: a pattern that the user attached to code, and the registry that finds it again.

A captured graph can carry plain strings only, so what travels in it is the key of an annotation.
"""

from __future__ import annotations

import functools
import itertools
import weakref
from dataclasses import dataclass, field

from sparse_compile.patterns.base import BoundMask, Pattern
from sparse_compile.selection.split import Split, selects, split

#: Where ``node.meta["custom"]`` of a captured graph holds the key of an annotation.
META_KEY = "sparse_compile"

_NUMBERS = itertools.count()


@dataclass(frozen=True, eq=False)
class Annotation:
    """What ``mask(pattern, promise)`` says about the attention in a piece of code.

    Attributes:
        pattern: who may attend to whom.
        promise: False: attend only here, on top of the code's own mask. True: the mask that the
            code passes is this pattern.
        target: what was annotated, as ``class Block``.
        module: id of the module that was annotated, if it was one; a name, no reference.
        key: its name in captured graphs. Counted in the order of decoration, so that a second
            process that runs the same program finds its compiled graphs in torch.compile's caches.
    """

    pattern: Pattern
    promise: bool = False
    target: str = ""
    module: int | None = None
    key: str = field(default_factory=lambda: f"a{next(_NUMBERS)}")

    def __post_init__(self) -> None:
        _ANNOTATIONS[self.key] = self

    def shown(self, path: str = "") -> str:
        """As the report shows it: ``restrict SlidingWindow(512), on layers.3 (class Block)``.

        Args:
            path: of the module that was annotated, if it was one.
        """
        place = f"{path} ({self.target})" if path else self.target
        return f"{'promise' if self.promise else 'restrict'} {self.pattern!r}, on {place}"

    @functools.cached_property
    def parts(self) -> Split | None:
        """The parts of a pattern that selects; None for any other."""
        return split(self.pattern) if selects(self.pattern) else None

    @functools.cached_property
    def bound(self) -> BoundMask:
        """The pattern's predicate and tables, worked out once."""
        return self.pattern.bound()


#: An annotation lives as long as the code it is attached to.
_ANNOTATIONS: weakref.WeakValueDictionary[str, Annotation] = weakref.WeakValueDictionary()


def annotation_named(key: str) -> Annotation | None:
    """The annotation with a key; None if what it was attached to is gone."""
    return _ANNOTATIONS.get(key)


#: Masks that are no annotation, by key.
_MASKS: dict[str, BoundMask] = {}


def name_mask(bound: BoundMask, owner: object) -> str:
    """A key for a mask, known for as long as ``owner`` lives."""
    key = f"m{next(_NUMBERS)}"
    _MASKS[key] = bound
    weakref.finalize(owner, _MASKS.pop, key, None)
    return key


def bound_mask_named(key: str) -> BoundMask | None:
    """The mask of an annotation, or one that :func:`name_mask` named.

    Args:
        key: of the annotation; with ``.static`` or ``.selected`` for a part of one that selects.
    """
    name, _, part = key.partition(".")
    annotation = annotation_named(name)
    if annotation is None:
        return _MASKS.get(key)
    bound: BoundMask | None = getattr(annotation.parts, part) if part else annotation.bound
    return bound
