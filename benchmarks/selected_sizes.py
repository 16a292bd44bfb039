"""The sizes of the problems with selected keys that are compared."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Sizes:
    """Of the problems: tokens, and those of the cases that differ."""

    n: int = 65536
    flex_n: int = 65536
    crossover: tuple[int, ...] = (4096, 8192, 12288, 16384, 32768)
    cache: int = 131072
    most: int = 64
    batches: tuple[int, ...] = (1, 64)
    indexed: int = 32768
    indexed_rows: int = 4096
    tokens: int = 2048
    device: str = "cuda"

    @property
    def on_gpu(self) -> bool:
        return self.device == "cuda"


DRY = Sizes(256, 256, (128, 192), 512, 4, (1, 2), 96, 32, 16, "cpu")
