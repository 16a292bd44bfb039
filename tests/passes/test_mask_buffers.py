"""Masks that a model holds: sparse at once, and right after every way to change them."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from sparse_compile.options import Options
from sparse_compile.passes import pipeline
from sparse_compile.sites.plan import Decision, Plan
from sparse_compile.sites.site import Rejection

N, D, ROOM = 40, 8, 64


def window(n: int, width: int) -> Tensor:
    i = torch.arange(n)
    return (i[:, None] >= i) & (i[:, None] - i < width)


class Holding(nn.Module):
    """A projection, and attention under the mask that ``bias`` holds."""

    def __init__(self) -> None:
        super().__init__()
        self.project = nn.Linear(D, D)

    def holds(self, keep: Tensor) -> Tensor:
        """What ``bias`` has to be for a bool mask [ROOM, ROOM]."""
        return keep


class Neo(Holding):
    """GPT-Neo's: a bool buffer, cut to the lengths of the call, and ``where`` with finfo.min."""

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("bias", self.holds(window(ROOM, 9)), persistent=True)

    def holds(self, keep: Tensor) -> Tensor:
        return keep.view(1, 1, ROOM, ROOM)

    def forward(self, x: Tensor) -> Tensor:
        scores = self.project(x).float() @ x.float().mT
        n = x.shape[2]
        least = torch.tensor(torch.finfo(scores.dtype).min, dtype=scores.dtype)
        scores = torch.where(self.bias[:, :, n - n : n, :n], scores, least)
        return scores.softmax(-1).to(x.dtype) @ x


class Nano(Holding):
    """nanoGPT's: zeros and ones, compared with 0."""

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("bias", self.holds(window(ROOM, 9)))

    def holds(self, keep: Tensor) -> Tensor:
        return keep.float().view(1, 1, ROOM, ROOM)

    def forward(self, x: Tensor) -> Tensor:
        scores, n = self.project(x) @ x.mT * D**-0.5, x.shape[2]
        scores = scores.masked_fill(self.bias[:, :, :n, :n] == 0, float("-inf"))
        return scores.softmax(-1) @ x


class Parameter(Holding):
    """A bool parameter without gradients."""

    def __init__(self) -> None:
        super().__init__()
        self.bias: Tensor = self.holds(window(ROOM, 9))

    def holds(self, keep: Tensor) -> Tensor:
        return nn.Parameter(keep, requires_grad=False)

    def forward(self, x: Tensor) -> Tensor:
        n = x.shape[2]
        keep = self.bias[:n, :n]
        return F.scaled_dot_product_attention(self.project(x), x, x, attn_mask=keep)


class Attribute(Parameter):
    """A tensor that is neither."""

    def holds(self, keep: Tensor) -> Tensor:
        return keep


class Distances(Parameter):
    """Numbers from which the mask is computed."""

    def holds(self, keep: Tensor) -> Tensor:
        return torch.where(keep, 1, 7)

    def forward(self, x: Tensor) -> Tensor:
        n = x.shape[2]
        scores = self.project(x) @ x.mT
        return scores.masked_fill(self.bias[:n, :n] > 3, float("-inf")).softmax(-1) @ x


MODELS: dict[str, Callable[[], Any]] = {
    "Neo": Neo,
    "Nano": Nano,
    "parameter": Parameter,
    "attribute": Attribute,
    "distances": Distances,
}


def compiled(model: Any, decisions: list[Decision], options: Mapping[str, Any]) -> Any:
    def backend(gm: Any, inputs: Any) -> Any:
        traces = pipeline.run(gm, inputs, Options.parse({"decide": "sparse", **options}))
        decisions.extend(trace.decided for trace in traces)
        return torch._dynamo.lookup_backend("aot_eager")(gm, inputs)

    torch._dynamo.reset()
    return torch.compile(model, backend=backend)


def step(model: nn.Module, run: Callable[[Tensor], Tensor], dtype: torch.dtype) -> list[Tensor]:
    x = torch.randn(1, 2, N, D, generator=torch.Generator().manual_seed(1)).to(dtype)
    x.requires_grad_()
    out = run(x)
    wanted = [x, *(p for p in model.parameters() if p.requires_grad)]
    return [out.detach(), *torch.autograd.grad(out.float().square().sum(), wanted)]


def agrees(model: nn.Module, run: Any, dtype: torch.dtype = torch.float32) -> None:
    tolerance = {"rtol": 1e-4, "atol": 1e-4} if dtype == torch.float32 else {"rtol": 0.1}
    for mine, theirs in zip(step(model, run, dtype), step(model, model, dtype), strict=True):
        scale = float(theirs.nan_to_num().abs().max())
        used = {"atol": 0.02 * scale, **tolerance}
        torch.testing.assert_close(mine, theirs, equal_nan=True, **used)


def random(share: float) -> Tensor:
    keep = torch.rand(ROOM, ROOM, generator=torch.Generator().manual_seed(2)) < share
    return keep | torch.eye(ROOM, dtype=torch.bool)


def in_place(model: Any) -> None:
    model.bias.copy_(model.holds(window(ROOM, 3)))


def a_part(model: Any) -> None:
    model.bias[..., 5:9, :] = model.holds(window(ROOM, 30))[..., 5:9, :]


def replaced(model: Any) -> None:
    model.bias = model.holds(window(ROOM, 20) | window(ROOM, ROOM).T)


def loaded(model: Any) -> None:
    state = model.state_dict()
    model.load_state_dict(
        {**state, **({"bias": model.holds(random(0.2))} if "bias" in state else {})}
    )


def assigned(model: Any) -> None:
    state = dict(model.state_dict())
    if "bias" in state:
        state["bias"] = model.holds(random(0.4))
    model.load_state_dict(state, assign=True)


def through_data(model: Any) -> None:
    model.bias.data.copy_(model.holds(random(0.1)))


def through_numpy(model: Any) -> None:
    model.bias.numpy()[...] = model.holds(random(0.3)).numpy()


def moved(model: Any) -> None:
    model.to(torch.bfloat16)


def an_empty_row(model: Any) -> None:
    keep = window(ROOM, 9)
    keep[7] = False
    model.bias.copy_(model.holds(keep))


COUNTED = (an_empty_row, in_place, a_part, replaced, loaded, assigned)


@pytest.mark.parametrize(
    ("name", "masks"), [*((name, "fresh") for name in MODELS), ("Neo", "stable")]
)
def test_a_mask_that_is_held_is_read_as_it_is_now(name: str, masks: str) -> None:
    torch.manual_seed(0)
    model, decisions = MODELS[name](), list[Decision]()
    run = compiled(model, decisions, {"masks": masks})
    agrees(model, run)
    (plan,) = decisions
    assert isinstance(plan, Plan), plan
    assert plan.lifted.dense, "nothing of its values may be baked in"
    uncounted = (through_data, through_numpy) if masks == "fresh" else ()
    for change in (*COUNTED, *uncounted):
        with torch.no_grad():
            change(model)
        agrees(model, run)
    assert len(decisions) == 1, "and nothing is compiled again"
    moved(model)
    for change in (None, in_place, replaced):
        with torch.no_grad():
            if change is not None:
                change(model)
        if name != "Nano" or change is not replaced:  # whose buffer is of another dtype then
            agrees(model, run, torch.bfloat16)
    assert len(decisions) == 2
    assert all(isinstance(decision, Plan) for decision in decisions)


@pytest.mark.parametrize("share", [0.2, 1.0])
def test_a_constant_of_the_program_is_lifted_from_what_it_holds(share: float) -> None:
    """A window is recognised; anything else that is constant is what it says."""
    keep = (window(8, 3) if share == 1.0 else random(share)[:8, :8]).tolist()

    def attend(x: Tensor) -> Tensor:
        mask = torch.tensor(keep)
        return F.scaled_dot_product_attention(x, x, x, attn_mask=mask)

    decisions: list[Decision] = []
    run = compiled(attend, decisions, {})
    x = torch.randn(1, 2, 8, D)
    torch.testing.assert_close(run(x), attend(x))
    (plan,) = decisions
    assert isinstance(plan, Plan), plan
    if share == 1.0:
        assert not plan.lifted.mask.uses_table


HELD = window(N, 9)


def test_a_global_is_read_as_it_is_now(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(globals(), "HELD", window(N, 9))

    def attend(x: Tensor) -> Tensor:
        return F.scaled_dot_product_attention(x, x, x, attn_mask=HELD)

    decisions: list[Decision] = []
    run = compiled(attend, decisions, {})
    x = torch.randn(1, 2, N, D)
    torch.testing.assert_close(run(x), attend(x))
    HELD[20:] = True
    torch.testing.assert_close(run(x), attend(x))
    monkeypatch.setitem(globals(), "HELD", window(N, 4))
    torch.testing.assert_close(run(x), attend(x))
    assert all(isinstance(decision, Plan) for decision in decisions)


class Added(Holding):
    """A floating mask, added to the scores."""

    def __init__(self, fill: float, parameter: bool, trained: bool = False) -> None:
        super().__init__()
        held = torch.zeros(N, N).masked_fill(~window(N, 9), fill)
        if parameter:
            self.bias = nn.Parameter(held, requires_grad=trained)
        else:
            self.register_buffer("bias", held)

    def forward(self, x: Tensor) -> Tensor:
        return (self.project(x) @ x.mT + self.bias).softmax(-1) @ x


@pytest.mark.parametrize("fill", [float("-inf"), torch.finfo(torch.float32).min])
@pytest.mark.parametrize("trained", [False, True])
def test_a_mask_in_a_parameter_stays_with_what_to_write_instead(fill: float, trained: bool) -> None:
    """What it holds later could be a bias, or rows without a key: its graph cannot know."""
    model, decisions = Added(fill, True, trained), list[Decision]()
    run = compiled(model, decisions, {})
    agrees(model, run)
    (rejection,) = decisions
    assert isinstance(rejection, Rejection)
    assert "only known at run time" in rejection.reason
    assert "bool" in rejection.hint
    with torch.no_grad():
        model.bias[5] = fill
    agrees(model, run)


@pytest.mark.parametrize("fill", [float("-inf"), torch.finfo(torch.float32).min])
def test_a_floating_mask_in_a_buffer_is_a_mask_and_a_bias(fill: float) -> None:
    model, decisions = Added(fill, False), list[Decision]()
    run = compiled(model, decisions, {})
    agrees(model, run)
    model.bias[7] += torch.randn(N)
    agrees(model, run)
    model.bias[5] = fill
    agrees(model, run)
    assert all(isinstance(decision, Plan) for decision in decisions)


def test_a_parameter_that_is_a_bias_is_rewritten() -> None:
    model, decisions = Added(-2.0, True, True), list[Decision]()
    agrees(model, compiled(model, decisions, {}))
    assert isinstance(decisions[0], Plan), decisions
