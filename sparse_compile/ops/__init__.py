"""The operators that rewritten graphs call, each with a fake.

Importing this registers them, and hands their kernels to layouts and selections.
"""

from sparse_compile.ops.attention import ATTENTION, LAYOUT
from sparse_compile.ops.builders import hand_in

hand_in()

__all__ = ["ATTENTION", "LAYOUT"]
