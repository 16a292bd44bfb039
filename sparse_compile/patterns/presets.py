"""The patterns of published models, with their published settings.

The head splits of BlockBERT and the lengths given for the Sparse Transformer were not checked
against the papers.

>>> from sparse_compile import patterns as P
>>> P.presets.longformer_base_4096()
Longformer(512)
"""

from __future__ import annotations

from sparse_compile.patterns.base import Pattern, heads
from sparse_compile.patterns.blocks import BigBird, BlockLocal
from sparse_compile.patterns.checks import bad, whole
from sparse_compile.patterns.global_ import Global, Longformer
from sparse_compile.patterns.grids import Axial
from sparse_compile.patterns.local import Causal, Fixed, SlidingWindow, Strided

#: Heads of BlockBERT that use each of the permutations, by the number of blocks.
_BLOCKBERT_HEADS = {2: (10, 2), 3: (8, 2, 2)}


def longformer_base_4096() -> Pattern:
    """Longformer-base: windows of 512 tokens and a global first token, for 4096 tokens.

    Beltagy et al. 2020, https://arxiv.org/abs/2004.05150. For question answering the tokens of the
    question are global too: ``Longformer(512, global_=n)``.
    """
    return Longformer(512)


def bigbird_base_4096() -> Pattern:
    """BigBird-base, internal construction: blocks of 64, three random, two global, for 4096 tokens.

    Zaheer et al. 2020, https://arxiv.org/abs/2007.14062. The window is three blocks wide.
    """
    return BigBird(block=64, random=3, global_=2, window=3)


def sparse_transformer_strided() -> Pattern:
    """The Sparse Transformer for images: stride 128, for 3072 or 12288 bytes.

    Child et al. 2019, https://arxiv.org/abs/1904.10509 (CIFAR-10 and ImageNet 64 x 64).
    """
    return Strided(128)


def sparse_transformer_fixed(summary: int = 8) -> Pattern:
    """The Sparse Transformer for text: blocks of 128 that end in ``summary`` tokens.

    Child et al. 2019, https://arxiv.org/abs/1904.10509, who recommend 8, 16 or 32; their model of
    Enwik8 uses 32, for 12288 bytes.
    """
    return Fixed(128, summary)


def blockbert(length: int = 512, blocks: int = 2) -> Pattern:
    """BlockBERT: 12 heads, most of them local to a block, the others to a shifted one.

    Qiu et al. 2020, https://arxiv.org/abs/1911.02972. With two blocks the heads are split 10:2,
    with three 8:2:2. The sequence has ``length`` tokens, 512 or 1024 in the paper.

    >>> blockbert(512, 3).patterns[-1]
    BlockLocal(171, permutation=(2, 0, 1))
    """
    if blocks not in _BLOCKBERT_HEADS:
        raise bad(f"blockbert of {blocks} blocks", "Write 2 or 3, as in the paper.")
    size = -(-whole("blockbert: length", length, blocks) // blocks)
    shifts = [shift for shift, count in enumerate(_BLOCKBERT_HEADS[blocks]) for _ in range(count)]
    return heads([_shifted(size, shift, blocks) for shift in shifts])


def _shifted(size: int, shift: int, blocks: int) -> BlockLocal:
    if not shift:
        return BlockLocal(size)
    return BlockLocal(size, tuple((block + shift) % blocks for block in range(blocks)))


def axial_transformer_64() -> Pattern:
    """The Axial Transformer on images of 64 x 64: rows and columns, for 4096 tokens.

    Ho et al. 2019, https://arxiv.org/abs/1912.12180.
    """
    return Axial((64, 64))


def streaming_llm(recent: int = 1020, sinks: int = 4) -> Pattern:
    """StreamingLLM: the last tokens, and the first few as attention sinks.

    Xiao et al. 2023, https://arxiv.org/abs/2309.17453. A cache of 1024 or 2048 keys, four of them
    sinks.

    Args:
        recent: how many of the last keys a query sees, itself among them.
        sinks: how many keys at the start all later ones see.

    >>> streaming_llm(2, sinks=1).dense(5, 5)[0, 0].int().tolist()
    [[1, 0, 0, 0, 0], [1, 1, 0, 0, 0], [1, 1, 1, 0, 0], [1, 0, 1, 1, 0], [1, 0, 0, 1, 1]]
    """
    near = SlidingWindow(whole("streaming_llm: recent", recent, 2) - 1, 0)
    return near | (Global(sinks, rows=False) & Causal())


def llama4_chunked(chunk: int = 8192) -> Pattern:
    """The local layers of Llama 4: a query sees what came before in its own chunk of 8192 tokens.

    Meta 2025, https://huggingface.co/meta-llama/Llama-4-Scout-17B-16E (``attention_chunk_size``);
    three layers of four. ``Packed(cu_seqlens, llama4_chunked())`` counts in each sequence.

    >>> llama4_chunked(2).dense(4, 4)[0, 0].int().tolist()
    [[1, 0, 0, 0], [1, 1, 0, 0], [0, 0, 1, 0], [0, 0, 1, 1]]
    """
    return BlockLocal(chunk) & Causal()
