"""Parameters: the base of values that check what they are made of, and print as what makes them."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator
from typing import Annotated, Any, ClassVar, get_origin, get_type_hints

from sparse_compile.patterns.data import spelled


class Parameters:
    """Base of patterns, scorers and settings, which are frozen dataclasses.

    The type of a parameter can have a check, as in ``window: Annotated[int, whole_from(1)]``: it
    raises if what is given makes no sense, and returns it in its one form. It is called with where
    the parameter stands, as in ``"Dilated: window"``, and with what is given.
    """

    #: Each parameter with a check, where it stands, and the check.
    _checks: ClassVar[tuple[tuple[str, str, Callable[[str, Any], Any]], ...]] = ()

    def __init_subclass__(cls) -> None:
        try:
            types = get_type_hints(cls, include_extras=True)
        except (NameError, AttributeError, TypeError):
            return  # of a user's class: what only type checkers import has no check
        cls._checks = tuple(
            (name, f"{cls.__name__}: {name}", kind.__metadata__[0])
            for name, kind in types.items()
            if get_origin(kind) is Annotated and callable(kind.__metadata__[0])
        )

    def __post_init__(self) -> None:
        for name, where, check in self._checks:
            object.__setattr__(self, name, check(where, getattr(self, name)))

    def implied(self) -> dict[str, Any]:
        """Parameters that need not be written, beyond plain defaults: what they are by default."""
        return {}

    def __repr__(self) -> str:
        return f"{type(self).__name__}({', '.join(self._arguments())})"

    def _arguments(self: Any) -> Iterator[str]:
        implied = self.implied()
        # What a base class adds by keyword comes first among the fields, but last in a call.
        for parameter in sorted(dataclasses.fields(self), key=lambda field: field.kw_only is True):
            text = spelled(getattr(self, parameter.name))
            default = implied.get(parameter.name, parameter.default)
            if default is dataclasses.MISSING:
                yield text
            elif text != spelled(default):
                yield f"{parameter.name}={text}"
