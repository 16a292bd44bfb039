"""The text of the kernels, with ``$holes``; :mod:`sparse_compile.codegen.triton.blocks.source` fills them.

A hole that is alone on its line stands for any number of lines, indented like it.
"""
