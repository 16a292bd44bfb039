"""What programs read besides q, k and v: how each tensor is drawn, as text."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Input:
    """A tensor that a program takes.

    Attributes:
        text: what makes it; ``randn(*shape)``, ``rand(*shape)`` and ``randint(low, high, shape)``
            draw, the first in the program's dtype.
        trained: whether it is a parameter.
    """

    text: str
    trained: bool = False


def _padded(kept: str) -> dict[str, Input]:
    return {
        "": Input(kept),
        "_long": Input(f"({kept}).long()"),
        "_float": Input(f"({kept}).float()"),
    }


_KEPT = {
    "pad": "rand(B, NK) < 0.8",
    "left": "torch.arange(NK) >= randint(0, NK // 2, (B, 1))",
    "right": "torch.arange(NK) < randint(NK // 2, NK + 1, (B, 1))",
    "full": "torch.ones(B, NK, dtype=torch.bool)",
}

INPUTS: dict[str, Input] = {
    **{name + how: one for name, kept in _KEPT.items() for how, one in _padded(kept).items()},
    "doc": Input("(rand(B, NK) < 0.15).cumsum(-1)"),
    "doc_int": Input("randint(0, 3, (B, NK)).int()"),
    "ends": Input("rand(B, NK) < 0.1"),
    "positions": Input("torch.arange(NK) - (torch.arange(NK) % randint(5, 20, (B, 1)))"),
    "lengths": Input("randint(1, NK + 1, (B,))"),
    "prefix": Input("randint(0, NK // 2, (B,))"),
    "starts": Input("torch.tensor([0, NK // 3, NK // 2, NK])"),
    "offset": Input("randint(0, NK, ())"),
    "windows": Input("randint(1, 12, (H,))"),
    "buffer": Input("torch.ones(1, 1, 128, 128, dtype=torch.bool).tril()"),
    "of_pairs": Input("rand(NQ, NK) < 0.6"),
    "of_batch": Input("rand(B, 1, NQ, NK) < 0.6"),
    "of_heads": Input("rand(1, H, NQ, NK) < 0.6"),
    "of_all": Input("rand(B, H, NQ, NK) < 0.6"),
    "chosen": Input("rand(B, 1, NQ, NK).topk(min(NK, 9)).indices"),
    "steps": Input("randint(-3, 4, (NQ, NK))"),
    "index": Input("randint(0, 25, (NQ, NK))"),
    "slopes": Input("2.0 ** -torch.arange(1, H + 1)"),
    "number": Input("randint(1, 5, ()) / 4"),
    "sinks": Input("randn(H)", trained=True),
    "temperature": Input("randn(1, H, 1, 1).abs() + 0.5", trained=True),
    "scalar": Input("randn(1).abs() + 0.5", trained=True),
    "of_queries": Input("randn(B, 1, NQ, 1).abs() + 0.5", trained=True),
    "table": Input("randn(H, 2 * (NQ + NK))", trained=True),
    "near": Input("randn(25, H)", trained=True),
    "buckets": Input("randn(32, H)", trained=True),
    "shaw": Input("randn(2 * (NQ + NK), D)", trained=True),
    "w_in": Input("randn(3 * H * D, H * D) / (H * D) ** 0.5", trained=True),
    "w_out": Input("randn(H * D, H * D) / (H * D) ** 0.5", trained=True),
    "bias_pairs": Input("randn(NQ, NK)", trained=True),
    "bias_heads": Input("randn(1, H, NQ, NK)", trained=True),
    "bias_keys": Input("randn(B, 1, 1, NK)", trained=True),
    "bias_all": Input("randn(B, H, NQ, NK)", trained=True),
}
