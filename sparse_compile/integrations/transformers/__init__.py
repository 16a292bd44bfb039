"""What this library does for models of transformers.

Importing it makes ``attn_implementation="sparse_compile"`` known, see :func:`register`.
:func:`sparsify` is for Longformer, LED, BigBird and LongT5, which are sparse by hand.

>>> from sparse_compile.integrations import transformers as _
>>> from transformers import AttentionInterface
>>> "sparse_compile" in AttentionInterface()
True
"""

from sparse_compile.integrations.transformers.interface import NAME, register
from sparse_compile.integrations.transformers.sparsify import sparsify

__all__ = ["NAME", "register", "sparsify"]

register()
