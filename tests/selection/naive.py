"""Selection by scores, spelled out in loops: what the library must do."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

from sparse_compile import patterns as P

TINY = torch.finfo(torch.float32).tiny


def parts(n: int, size: int) -> list[range]:
    return [range(at, min(at + size, n)) for at in range(0, n, size)]


def lists_of(pattern: P.Scored, q: Tensor, k: Tensor) -> int:
    return {"group": k.shape[1], "all": 1, "none": q.shape[1]}[pattern.share]


def over_heads(by_head: Tensor, lists: int) -> Tensor:
    return by_head.view(by_head.shape[0], lists, -1, *by_head.shape[2:]).sum(2)


def scores(pattern: P.Scored, q: Tensor, k: Tensor, mask: Tensor) -> Tensor:
    """fp64 [B, Hs, Uq, blocks] by a plain definition; mask is [B, Hq, Nq, Nkv]."""
    scorer: Any = pattern.scorer
    lists = lists_of(pattern, q, k)
    q, k = q.double(), k.double().repeat_interleave(q.shape[1] // k.shape[1], 1)
    units, blocks = parts(q.shape[2], pattern.unit_q), parts(k.shape[2], pattern.block_kv)
    if isinstance(scorer, P.Indexer):
        return _indexed(scorer, units, blocks)
    if isinstance(scorer, P.OverlapPool):
        mass = over_heads(_windows(scorer, q, k, mask, units, blocks), lists)
        return mass.clamp(min=TINY).log()
    if isinstance(scorer, P.Antidiagonal):
        mass = over_heads(_antidiagonals(scorer, q, k, mask, pattern), lists)
        return mass.clamp(min=TINY).log()
    by_token = torch.stack([_by_block(scorer, q, k, block) for block in blocks], -1)
    by_unit = torch.stack([by_token[:, :, list(unit)].mean(2) for unit in units], 2)
    return over_heads(by_unit / math.sqrt(q.shape[3]), lists)


def _by_block(scorer: Any, q: Tensor, k: Tensor, block: range) -> Tensor:
    keys = k[:, :, list(block)]
    if isinstance(scorer, P.MeanPool):
        return torch.einsum("bhqd,bhd->bhq", q, keys.mean(2))
    lo, hi = keys.amin(2)[:, :, None], keys.amax(2)[:, :, None]
    return torch.maximum(q * lo, q * hi).sum(-1)


def _indexed(scorer: P.Indexer, units: list[range], blocks: list[range]) -> Tensor:
    products = torch.einsum("bhqd,bkd->bhqk", scorer.q_index.double(), scorer.k_index.double())
    by_token = torch.einsum("bhqk,bqh->bqk", products.relu(), scorer.weights.double())
    by_block = torch.stack([by_token[..., list(block)].amax(-1) for block in blocks], -1)
    return torch.stack([by_block[:, list(unit)].mean(1) for unit in units], 1)[:, None]


def _windows(
    scorer: P.OverlapPool, q: Tensor, k: Tensor, mask: Tensor, units: Any, blocks: Any
) -> Tensor:
    n, size, stride = k.shape[2], scorer.window, scorer.stride
    count = 1
    while (count - 1) * stride + size < n:
        count += 1
    windows = [range(i * stride, min(i * stride + size, n)) for i in range(count)]
    means = torch.stack([k[:, :, list(window)].mean(2) for window in windows], 2)
    seen = torch.stack([mask[..., list(window)].all(-1) for window in windows], -1)
    logits = (q @ means.mT / math.sqrt(q.shape[3])).masked_fill(~seen, -math.inf)
    weight = logits.softmax(-1).nan_to_num(0)
    found = torch.zeros(*q.shape[:2], len(units), len(blocks), dtype=torch.float64)
    for i, window in enumerate(windows):
        for cell in range(i, i + size // stride):
            at = cell * stride
            if at >= n:
                continue
            assert at in window
            j = next(j for j, block in enumerate(blocks) if at in block)
            for u, unit in enumerate(units):
                found[:, :, u, j] += weight[:, :, list(unit), i].sum(-1)
    return found


def _antidiagonals(
    scorer: P.Antidiagonal, q: Tensor, k: Tensor, mask: Tensor, pattern: P.Scored
) -> Tensor:
    stride = scorer.stride
    products = q @ k.mT / math.sqrt(q.shape[3]) / stride
    rows, columns = parts(q.shape[2], stride), parts(k.shape[2], stride)
    logits = torch.full((*q.shape[:2], len(rows), len(columns)), -math.inf, dtype=torch.float64)
    for i, row in enumerate(rows):
        for j, column in enumerate(columns):
            seen = mask[:, :, list(row)][..., list(column)].flatten(2).any(-1)
            total = sum(
                products[:, :, x, y]
                for x in row
                for y in column
                if x - row[0] + y - column[0] == stride - 1
            )
            logits[:, :, i, j] = torch.where(seen, torch.as_tensor(total), -math.inf)
    weight = logits.softmax(-1).nan_to_num(0)
    per_q, per_kv = pattern.unit_q // stride, pattern.block_kv // stride
    by_column = torch.stack([weight[..., list(c)].sum(-1) for c in parts(len(columns), per_kv)], -1)
    return torch.stack([by_column[:, :, list(r)].sum(2) for r in parts(len(rows), per_q)], 2)


def chosen(pattern: Any, scores: Tensor, mask: Tensor) -> list[list[list[list[int]]]]:
    """The blocks of every row, from scores [B, Hs, Uq, blocks] and the mask [B, Hq, Nq, Nkv]."""
    batch, lists, rows, _ = scores.shape
    members = mask.shape[1] // lists
    found: list[Any] = [[[[] for _ in range(rows)] for _ in range(lists)] for _ in range(batch)]
    for b in range(batch):
        for s in range(lists):
            for u in range(rows):
                part = mask[b, s * members : (s + 1) * members]
                part = part[:, u * pattern.unit_q : (u + 1) * pattern.unit_q]
                tokens = part.flatten(0, 1).any(0)
                visible = [
                    j
                    for j, block in enumerate(parts(mask.shape[3], pattern.block_kv))
                    if tokens[list(block)].any()
                ]
                found[b][s][u] = row(
                    pattern, scores[b, s, u].tolist(), visible, forced(pattern, u, mask), s
                )
    return found


def forced(pattern: Any, u: int, mask: Tensor) -> set[int]:
    n_q, n_kv = mask.shape[2:]
    reach = max(pattern.local, int(pattern.diagonal))
    shift = n_kv - n_q if pattern.align == "lower_right" else 0
    found = set(range(pattern.sink))
    for query in range(u * pattern.unit_q, min((u + 1) * pattern.unit_q, n_q)):
        own = (query + shift) // pattern.block_kv
        found |= set(range(own - reach + 1, own + 1))
    return found


def row(rule: Any, scores: list[float], visible: list[int], forced: set[int], s: int) -> list[int]:
    """What a rule selects of a row."""
    forced = forced & set(visible)
    counted = [j for j in visible if scores[j] > -math.inf]
    by_score = sorted((j for j in counted if j not in forced), key=lambda j: (-scores[j], j))
    order = sorted(forced) + by_score
    room = rule.capacity(len(scores))

    def own(value: Any) -> Any:
        return value[s] if isinstance(value, tuple) else value

    share = dict.fromkeys(range(len(scores)), 0.0)
    if counted:
        top = max(scores[j] for j in counted)
        for j in counted:
            infinite = math.isinf(top)
            share[j] = float(scores[j] == top) if infinite else math.exp(scores[j] - top)
        total = sum(share.values())
        share = {j: value / total for j, value in share.items()}
    if isinstance(rule, P.TopK):
        kept = order[: own(rule.k)]
    elif isinstance(rule, P.TopRatio):
        kept = order[: math.ceil(round(own(rule.ratio) * len(visible), 9))]
    elif isinstance(rule, P.Threshold):
        values = share if rule.of == "softmax" else scores
        kept = [j for j in order if values[j] >= own(rule.t)]
    else:
        kept, before = [], 0.0
        for j in order:
            if before < own(rule.p) or own(rule.p) == 1:
                kept.append(j)
            before += share[j]
    wanted = set(kept) | forced
    return sorted([j for j in order if j in wanted][:room])
