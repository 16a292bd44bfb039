"""The text of the kernels, with ``$holes``, which the ``source`` modules fill.

A hole that is alone on its line stands for any number of lines, indented like it.
"""
