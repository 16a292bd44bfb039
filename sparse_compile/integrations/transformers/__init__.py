"""What this library does for models of transformers.

>>> from sparse_compile.integrations.transformers import sparsify

:func:`sparsify` has it compute the attention that Longformer, LED and BigBird do in chunks.
"""

from sparse_compile.integrations.transformers.sparsify import sparsify

__all__ = ["sparsify"]
