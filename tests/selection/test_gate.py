"""PooledGate against its definition in plain loops."""

from __future__ import annotations

import math
import re
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from sparse_compile.errors import BadPattern, BadShape
from sparse_compile.expr import KV, MaskExpr, Q
from sparse_compile.selection import (
    PooledGate,
    allowed_units,
    distillation_loss,
    pooled_attention,
)


def operands(gate: PooledGate, n_q: int, n_kv: int) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(0)
    q = torch.randn(2, gate.q_heads, n_q, gate.head_dim, generator=generator)
    return q, torch.randn(2, gate.kv_heads, n_kv, gate.head_dim, generator=generator)


def turned(x: Tensor, place: int, rope: int) -> Tensor:
    """The last ``rope`` numbers of x as complex ones, turned."""
    if not rope:
        return x
    still, moving = x[:-rope], x[-rope:]
    a = torch.complex(moving[: rope // 2], moving[rope // 2 :])
    speed = 10000.0 ** (-torch.arange(rope // 2) / (rope // 2))
    b = a * torch.polar(torch.ones(rope // 2), place * speed)
    return torch.cat([still, b.real, b.imag])


def plain(gate: PooledGate, q: Tensor, k: Tensor) -> Tensor:
    """One score at a time."""
    late = k.shape[2] - q.shape[2]
    rows, units = -(-q.shape[2] // gate.unit_q), -(-k.shape[2] // gate.unit_kv)
    out = torch.empty(q.shape[0], gate.lists, rows, units)
    for b, s, i, j in torch.cartesian_prod(*(torch.arange(n) for n in out.shape)).tolist():
        heads = range(gate.q_heads)
        mine = [h for h in heads if h // (gate.q_heads // gate.lists) == s]
        of_keys = sorted({h // (gate.q_heads // gate.kv_heads) for h in mine})
        some_q = q[b, mine, i * gate.unit_q : (i + 1) * gate.unit_q].mean(1).flatten()
        query = turned(
            some_q @ gate.q_weight[s] + gate.q_bias[s, 0], i * gate.unit_q + late, gate.rope
        )
        part = gate.unit_kv // gate.parts
        scores = []
        for start in range(j * gate.unit_kv, min((j + 1) * gate.unit_kv, k.shape[2]), part):
            some_k = k[b, of_keys, start : start + part]
            pooled = torch.cat([some_k.mean(1), some_k.amax(1), some_k.amin(1)], 1).flatten()
            key = turned(pooled @ gate.k_weight[s] + gate.k_bias[s, 0], start, gate.rope)
            scores.append(query @ key / math.sqrt(gate.head_dim))
        out[b, s, i, j] = scores[0] if gate.parts == 1 else torch.stack(scores).logsumexp(0)
    return out


GATES = {
    "plain": PooledGate(8, 2, 2, unit_kv=4),
    "groups": PooledGate(8, 6, 2, unit_kv=4),
    "one list for all": PooledGate(8, 6, 2, lists=1, unit_kv=4),
    "a list for each query head": PooledGate(8, 6, 2, lists=6, unit_kv=4),
    "queries in units": PooledGate(8, 4, 2, unit_q=4, unit_kv=4),
    "narrow": PooledGate(8, 4, 2, unit_kv=4, width=3),
    "wide": PooledGate(8, 4, 2, unit_kv=4, width=20),
    "positions": PooledGate(8, 4, 2, unit_kv=4, rope=6),
    "parts": PooledGate(8, 4, 2, unit_kv=8, parts=4),
    "parts with positions": PooledGate(8, 4, 2, unit_kv=4, rope=6, parts=2),
    "positions only": PooledGate(8, 4, 2, unit_q=2, unit_kv=4, width=8, rope=8),
}


@pytest.mark.parametrize("lengths", [(12, 12), (13, 18), (1, 9)], ids=str)
@pytest.mark.parametrize("gate", GATES.values(), ids=list(GATES))
@torch.no_grad()
def test_equals_its_definition(gate: PooledGate, lengths: tuple[int, int]) -> None:
    for parameter in gate.parameters():
        torch.nn.init.normal_(parameter, std=0.3, generator=torch.Generator().manual_seed(1))
    q, k = operands(gate, *lengths)
    torch.testing.assert_close(gate(q, k), plain(gate, q, k), rtol=1e-4, atol=1e-4)


def test_starts_as_the_mean_of_the_keys() -> None:
    gate = PooledGate(32, 4, 2, unit_kv=8, rope=8)
    q, k = operands(gate, 32, 32)
    mean = k.unflatten(2, (-1, 8)).mean(3)
    wanted = (q.unflatten(1, (2, 2)).sum(2) @ mean.mT) / math.sqrt(32)
    pair = torch.stack([gate(q, k).flatten(), wanted.flatten()])
    assert torch.corrcoef(pair)[0, 1] > 0.9


def test_half_precision_operands() -> None:
    gate = PooledGate(16, 4, 2, unit_kv=8)
    q, k = operands(gate, 20, 20)
    found = gate(q.bfloat16(), k.bfloat16())
    assert found.dtype == torch.float32
    torch.testing.assert_close(found, gate(q, k), rtol=0.1, atol=0.1)


def test_learns_what_attention_looks_at() -> None:
    """Attention by one channel that the mean of the keys hides: the gate finds it."""
    torch.manual_seed(0)
    gate = PooledGate(8, 2, 1, unit_kv=8)
    units = {"unit_q": 1, "unit_kv": 8, "mask": MaskExpr(KV <= Q), "lists": 1}
    optimiser = torch.optim.Adam(gate.parameters(), 0.02)
    scale = torch.tensor([0.1] * 7 + [2.0])
    losses = []
    for _ in range(120):
        q, k = torch.randn(2, 2, 64, 8).abs() * scale, torch.randn(2, 1, 64, 8) * scale
        loss = distillation_loss(
            gate(q, k), pooled_attention(q, k, reduce="sum", **units), allowed_units(q, k, **units)
        )
        optimiser.zero_grad()
        loss.backward()
        optimiser.step()
        losses.append(loss.item())
    assert sum(losses[-10:]) < 0.5 * sum(losses[:10])


def test_the_documented_training_runs() -> None:
    page = Path(__file__).parents[2] / "docs" / "training-a-gate.md"
    program, use = re.findall(r"```python\n(.*?)```", page.read_text(), re.DOTALL)
    q, k = torch.randn(1, 4, 64, 32), torch.randn(1, 2, 64, 32)
    names: dict[str, Any] = {"attention_inputs": [(q, k)] * 20}
    exec(program, names)
    first = distillation_loss(PooledGate(32, 4, 2, unit_kv=16)(q, k), names["target"])
    assert names["loss"] < first
    exec(use, names | {"q": q, "k": k, "v": k})


def test_runs_in_torch_compile() -> None:
    gate = PooledGate(16, 4, 2, unit_kv=8, rope=4)
    q, k = operands(gate, 20, 20)
    compiled = torch.compile(gate, backend="aot_eager", fullgraph=True)
    torch.testing.assert_close(compiled(q, k), gate(q, k))


def test_prints_what_it_is_made_of() -> None:
    assert "lists=2, unit_q=1, unit_kv=64" in repr(PooledGate(16, 4, 2))


def test_mistakes() -> None:
    with pytest.raises(BadPattern, match="4 query heads, 3 key heads"):
        PooledGate(16, 4, 3)
    with pytest.raises(BadPattern, match="3 lists do not group"):
        PooledGate(16, 12, 4, lists=3)
    with pytest.raises(BadPattern, match="rope is 3"):
        PooledGate(16, 4, 2, rope=3)
    with pytest.raises(BadPattern, match="unit_kv is 0"):
        PooledGate(16, 4, 2, unit_kv=0)
    with pytest.raises(BadPattern, match="3 parts of a unit of 64"):
        PooledGate(16, 4, 2, parts=3)
    gate = PooledGate(16, 4, 2)
    q, k = operands(gate, 20, 20)
    with pytest.raises(BadShape, match=r"made for q \[B, 4, Nq, 16\]"):
        gate(q[:, :2], k)
