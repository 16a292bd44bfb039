"""Filling the holes of templates."""

from __future__ import annotations

import re


def fill(template: str, **holes: str | list[str]) -> str:
    """The template with its holes filled; a list fills whole lines, indented like the hole.

    >>> fill("def f():\\n    $BODY\\n    return $X\\n", BODY=["a = 1", "b = 2"], X="a")
    'def f():\\n    a = 1\\n    b = 2\\n    return a\\n'
    """

    def filled(match: re.Match[str]) -> str:
        indent, alone, inline = match.groups()
        if inline:
            return str(holes[inline])
        value = holes[alone]
        block = [value] if isinstance(value, str) else value
        return "".join(f"{indent}{line}".rstrip() + "\n" for line in block)

    # One pass, so that what fills a hole is never searched for holes.
    return re.sub(r"^( *)\$([A-Z_]+)\n|\$([A-Z_]+)", filled, template, flags=re.MULTILINE)
