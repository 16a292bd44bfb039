"""``mode="reduce-overhead"`` records a model of known sizes in one CUDA graph, attention too."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from tests.tolerance import relative_error

N, D = 2048, 64


class Model(nn.Module):
    """Two layers of attention to a window and a global token, whose long row is split."""

    def __init__(self) -> None:
        super().__init__()
        self.project = nn.Linear(D, D)

    def forward(self, x: Tensor) -> Tensor:
        i = torch.arange(x.shape[2], device=x.device)
        near = (i[:, None] - i).abs() < 100
        mask = near | (i[:, None] < 1) | (i < 1)
        for _ in range(2):
            q = self.project(x)
            x = x + F.scaled_dot_product_attention(q, x, x, attn_mask=mask)
        return x


@pytest.mark.parametrize("train", [False, True])
def test_one_graph_is_recorded(train: bool) -> None:
    from torch._dynamo.utils import counters

    torch.manual_seed(0)
    model = Model().cuda().bfloat16().requires_grad_(train)
    run = torch.compile(model, backend="sparse_compile", mode="reduce-overhead", fullgraph=True)
    counters.clear()
    for seed in range(4):
        torch.manual_seed(seed)
        x = torch.randn(1, 4, N, D, device="cuda", dtype=torch.bfloat16)
        torch.compiler.cudagraph_mark_step_begin()
        out, wanted = run(x), model(x)
        assert relative_error(out, wanted.double()) < 2e-2
        if train:
            out.float().square().mean().backward()
            found = [p.grad.clone() for p in model.parameters()]
            model.zero_grad()
            wanted.float().square().mean().backward()
            for grad, parameter in zip(found, model.parameters(), strict=True):
                assert relative_error(grad, parameter.grad.double()) < 5e-2
            model.zero_grad()
    assert not counters["inductor"]["cudagraph_skips"]
    assert not counters["inductor"]["cudagraph_partitions"]
