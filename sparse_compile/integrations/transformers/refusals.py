"""What attention that never makes its weights cannot do, told before anything runs."""

from __future__ import annotations

from typing import Any

from sparse_compile.errors import WeightsNeeded


def refuse_weights(module: Any, asked: object) -> None:
    """Raise if weights are to be returned."""
    if asked:
        raise WeightsNeeded(
            f"sparse_compile: {type(module).__name__} got output_attentions=True, but its weights "
            "are never made. Remove it, or ask a model that is not sparsified."
        )


def refuse_dropout(module: Any, probability: float) -> None:
    """Raise if weights are to be dropped, as they are in training."""
    if probability and module.training:
        raise WeightsNeeded(
            f"sparse_compile: {type(module).__name__} drops attention weights in training (p = "
            f"{probability}), but its weights are never made. Write sparsify(model, "
            "attention_dropout=False) to train without that, or call model.eval()."
        )
