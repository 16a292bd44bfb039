"""PooledGate: a small network that predicts which units of keys a query attends to."""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from sparse_compile.errors import BadShape
from sparse_compile.patterns.checks import bad, whole
from sparse_compile.selection.scores import mean_of_units

_POOLS = ("mean", "max", "min")


class PooledGate(nn.Module):
    """A learned scorer of units of keys, after SeerAttention (arXiv:2410.13276).

    The mean, the maximum and the minimum of the keys of a unit go through one linear map, the
    queries, each or the mean of a unit of them (as SeerAttention-R and SeerAttention do), through
    another; the score is the product of the two, divided by sqrt(D). Each list has its own maps;
    the query heads that share it are concatenated, and so are its key heads.

    The last ``rope`` channels of both are rotated by position before the product. Since the maps
    have biases, the gate can then learn how attention depends on distance alone.

    With several ``parts`` each part of a unit is pooled and scored on its own, and the unit gets
    the log-sum-exp, so a key that matters is not lost among the others. SeerAttention has one part.

    It starts as ``q . mean of the keys`` summed over the heads of a list, which is MoBA's score.

    Args:
        head_dim: D.
        q_heads, kv_heads: Hq and Hkv; Hkv divides Hq.
        lists: Hs, how many lists of units it scores, a divisor of Hq; one of Hs and Hkv divides the
            other. None: Hkv, so query heads that share keys share a list.
        unit_q, unit_kv: consecutive queries, and keys, that are selected together.
        width: channels of the product; None: D, and ``rope`` more.
        rope: even number of channels that carry positions, at most ``width``. 0: none do.
        parts: how many parts of a unit are pooled, a divisor of ``unit_kv``; the scores of parts
            take ``parts`` times the memory of those of units.

    Raises:
        BadPattern: the numbers do not fit together.

    >>> gate = PooledGate(16, q_heads=4, kv_heads=2, unit_kv=32)
    >>> gate(torch.randn(1, 4, 100, 16), torch.randn(1, 2, 100, 16)).shape
    torch.Size([1, 2, 100, 4])
    """

    def __init__(
        self,
        head_dim: int,
        q_heads: int,
        kv_heads: int,
        *,
        lists: int | None = None,
        unit_q: int = 1,
        unit_kv: int = 64,
        width: int | None = None,
        rope: int = 0,
        parts: int = 1,
    ) -> None:
        super().__init__()
        self.head_dim = whole("PooledGate: head_dim", head_dim, 1)
        self.q_heads, self.kv_heads = q_heads, kv_heads
        self.lists = whole("PooledGate: lists", kv_heads if lists is None else lists, 1)
        self.unit_q = whole("PooledGate: unit_q", unit_q, 1)
        self.unit_kv = whole("PooledGate: unit_kv", unit_kv, 1)
        self.rope = whole("PooledGate: rope", rope, 0)
        self.parts = whole("PooledGate: parts", parts, 1)
        self.width = whole("PooledGate: width", head_dim + rope if width is None else width, 1)
        self._check_numbers()
        q_width = q_heads // self.lists * head_dim
        k_width = max(kv_heads // self.lists, 1) * len(_POOLS) * head_dim
        self.q_weight = nn.Parameter(torch.empty(self.lists, q_width, self.width))
        self.k_weight = nn.Parameter(torch.empty(self.lists, k_width, self.width))
        self.q_bias = nn.Parameter(torch.empty(self.lists, 1, self.width))
        self.k_bias = nn.Parameter(torch.empty(self.lists, 1, self.width))
        self.reset_parameters()

    @torch.no_grad()
    def reset_parameters(self) -> None:
        """Make it MoBA's scorer, up to a little noise that lets the other channels learn."""
        still, dim = min(self.width - self.rope, self.head_dim), self.head_dim
        for parameter in self.parameters():
            nn.init.normal_(parameter, std=0.01)
        for start in range(0, self.q_weight.shape[1], dim):
            self.q_weight[:, start : start + still, :still] = torch.eye(still)
        for start in range(0, self.k_weight.shape[1], len(_POOLS) * dim):
            self.k_weight[:, start : start + still, :still] = torch.eye(still)

    def forward(self, q: Tensor, k: Tensor) -> Tensor:
        """Scores of all pairs of units, also of those that a mask hides.

        Args:
            q: [B, Hq, Nq, D].
            k: [B, Hkv, Nkv, D]. The last query stands at the last key, for ``rope``.

        Returns:
            [B, Hs, ceil(Nq / unit_q), ceil(Nkv / unit_kv)] in the dtype of the parameters.

        Raises:
            BadShape: q or k is of other heads or another head dimension.
        """
        self._check_operands(q, k)
        queries = self._queries(q.to(self.q_weight.dtype)) @ self.q_weight + self.q_bias
        keys = self._keys(k.to(self.k_weight.dtype)) @ self.k_weight + self.k_bias
        if self.rope:
            queries = self._turned(queries, self.unit_q, k.shape[2] - q.shape[2])
            keys = self._turned(keys, self._part, 0)
        scores = queries @ keys.mT / math.sqrt(self.head_dim)
        if self.parts == 1:
            return scores
        # The last unit may lack parts.
        scores = F.pad(scores, (0, -scores.shape[-1] % self.parts), value=-math.inf)
        return torch.unflatten(scores, -1, (-1, self.parts)).logsumexp(-1)

    def extra_repr(self) -> str:
        """What it is made of, in the print of a model."""
        names = ["head_dim", "q_heads", "kv_heads", "lists", "unit_q", "unit_kv", "width", "rope"]
        names.append("parts")
        return ", ".join(f"{name}={getattr(self, name)}" for name in names)

    @property
    def _part(self) -> int:
        """Keys that are pooled together."""
        return self.unit_kv // self.parts

    def _queries(self, q: Tensor) -> Tensor:
        """[B, Hs, Uq, (Hq / Hs) * D]: the mean of each unit of queries."""
        pooled = mean_of_units(q, self.unit_q)
        return torch.unflatten(pooled, 1, (self.lists, -1)).transpose(2, 3).flatten(3)

    def _keys(self, k: Tensor) -> Tensor:
        """[B, Hs, parts, heads * 3 * D]: mean, maximum and minimum of each part of the keys."""
        size = -k.shape[2] % self._part
        # Repeating the last key changes neither the maximum nor the minimum.
        rows = torch.cat([k, k[:, :, -1:].expand(-1, -1, size, -1)], 2)
        rows = torch.unflatten(rows, 2, (-1, self._part))
        pooled = torch.cat([mean_of_units(k, self._part), rows.amax(3), rows.amin(3)], -1)
        if self.lists >= self.kv_heads:
            return pooled.repeat_interleave(self.lists // self.kv_heads, 1)
        return torch.unflatten(pooled, 1, (self.lists, -1)).transpose(2, 3).flatten(3)

    def _turned(self, x: Tensor, unit: int, first: int) -> Tensor:
        """The last ``rope`` channels rotated by the position of the first token of each unit."""
        half = self.rope // 2
        speed = torch.arange(half, device=x.device, dtype=torch.float32) * (-math.log(1e4) / half)
        place = torch.arange(x.shape[2], device=x.device, dtype=torch.float32) * unit + first
        angle = place[:, None] * speed.exp()
        cos, sin = angle.cos().to(x.dtype), angle.sin().to(x.dtype)
        still, a, b = torch.split(x, [self.width - self.rope, half, half], -1)
        return torch.cat([still, a * cos - b * sin, a * sin + b * cos], -1)

    def _check_numbers(self) -> None:
        q_heads = whole("PooledGate: q_heads", self.q_heads, 1)
        kv_heads = whole("PooledGate: kv_heads", self.kv_heads, 1)
        nested = max(self.lists, kv_heads) % min(self.lists, kv_heads) == 0
        if q_heads % kv_heads or q_heads % self.lists or not nested:
            raise bad(
                f"PooledGate: {q_heads} query heads, {kv_heads} key heads and {self.lists} lists "
                "do not group",
                "Key heads and lists divide the query heads, and one of them divides the other.",
            )
        if self.unit_kv % self.parts:
            raise bad(
                f"PooledGate: {self.parts} parts of a unit of {self.unit_kv} keys",
                "Write a divisor of unit_kv.",
            )
        if self.rope % 2 or self.rope > self.width:
            raise bad(
                f"PooledGate: rope is {self.rope} for a width of {self.width}",
                "Write an even number of channels, at most the width.",
            )

    def _check_operands(self, q: Tensor, k: Tensor) -> None:
        wanted = (self.q_heads, self.head_dim), (self.kv_heads, self.head_dim)
        found = tuple((t.shape[1], t.shape[3]) if t.dim() == 4 else () for t in (q, k))
        if found != wanted or q.shape[0] != k.shape[0]:
            raise BadShape(
                f"sparse_compile: PooledGate got q {list(q.shape)} and k {list(k.shape)}. It was "
                f"made for q [B, {self.q_heads}, Nq, {self.head_dim}] and k "
                f"[B, {self.kv_heads}, Nkv, {self.head_dim}]."
            )
