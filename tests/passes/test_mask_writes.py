"""Every way to write into a mask, in torch and in numpy: read as eager reads it, and rewritten."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from torch import Tensor

from sparse_compile.sites.plan import Plan
from tests.passes.rewritten import Rewritten

N = 24
Array = NDArray[np.bool_]


def attend(x: Tensor, mask: Tensor) -> Tensor:
    return F.scaled_dot_product_attention(x, x, x, attn_mask=mask)


def check(masks: Callable[[], tuple[Tensor, ...]]) -> list[Plan]:
    """Compile attention under masks made inside: rewritten, and as eager has it."""
    x = torch.randn(1, 2, N, 8, generator=torch.Generator().manual_seed(0))

    def run(x: Tensor) -> list[Tensor]:
        return [attend(x, mask) for mask in masks()]

    made = Rewritten()
    torch.testing.assert_close(made.compiled(run)(x), run(x), equal_nan=True)
    plans = [decision for decision in made.decisions if isinstance(decision, Plan)]
    assert len(plans) == len(made.decisions) == len(masks()), made.decisions
    return plans


def no_array() -> Array:
    return np.zeros((N, N), dtype=bool)


def band() -> Array:
    i = np.arange(N)
    return (i[:, None] - i[None] < 5) & (i[None] <= i[:, None])


NUMPY: dict[str, Callable[[Array], object]] = {
    "slice": lambda m: m.__setitem__((slice(None), slice(0, 8)), True),
    "block": lambda m: m.__setitem__((slice(4, 9), slice(4, 9)), True),
    "row": lambda m: m.__setitem__(3, True),
    "scalar": lambda m: m.__setitem__((3, 4), True),
    "negative step": lambda m: m.__setitem__((slice(None), slice(None, None, 3)), True),
    "array": lambda m: m.__setitem__(slice(None), band()),
    "index": lambda m: m.__setitem__((np.arange(N), np.arange(N)), True),
    "fill_diagonal": lambda m: np.fill_diagonal(m, True),
    "ior": lambda m: m.__ior__(band()),
    "ixor of a view": lambda m: m[2:9].__ixor__(band()[2:9]),
    "iand": lambda m: (m.__ior__(band()), m.__iand__(np.arange(N) < 9)),
    "view": lambda m: m[2:9][:, 3:7].__setitem__(slice(None), True),
    "transposed": lambda m: m.T.__setitem__(3, True),
    "reshaped": lambda m: m.reshape(-1).__setitem__(slice(None, None, N + 1), True),
    "ravelled": lambda m: m.ravel().__setitem__(slice(0, 5), True),
    "fill": lambda m: m[:4].fill(True),
    "out": lambda m: np.logical_or(m, band(), out=m),
    "positional out": lambda m: np.logical_or(m, band(), m),
    "out into a view": lambda m: np.logical_not(m[3:6], out=m[3:6]),
}


@pytest.mark.parametrize("name", NUMPY)
def test_arrays_that_are_written_to(name: str) -> None:
    """Before they become tensors, afterwards, and where they were tensors from the start."""

    def masks() -> tuple[Tensor, ...]:
        before, after = no_array(), no_array()
        NUMPY[name](before)
        late = torch.from_numpy(after)
        NUMPY[name](after)
        through = torch.zeros(N, N, dtype=torch.bool)
        NUMPY[name](through.numpy())
        return torch.from_numpy(before | (np.arange(N) < 1)), late, through

    check(masks)


def test_numbers_that_numpy_adds_in_place() -> None:
    def masks() -> tuple[Tensor, ...]:
        m = np.zeros((N, N))
        m += band()
        m[:2] -= 1
        m *= -1
        return (torch.from_numpy(m) < 0.5,)

    check(masks)


def test_arrays_of_a_program_without_writes_are_lifted_without_tables() -> None:
    (plan,) = check(lambda: (torch.from_numpy(band() | np.eye(N, dtype=bool)),))
    assert not plan.lifted.mask.uses_table


def rows() -> Tensor:
    return torch.arange(N)[:, None]


def keys() -> Tensor:
    return torch.arange(N)[None]


def near() -> Tensor:
    return (rows() - keys()).abs() < 4


TORCH: dict[str, Callable[[Tensor], object]] = {
    "setitem": lambda m: m.__setitem__((slice(None), slice(0, 4)), True),
    "setitem of a mask": lambda m: m.__setitem__(near(), True),
    "setitem of indices": lambda m: m.__setitem__(torch.tensor([1, 5]), True),
    "setitem of two indices": lambda m: m.__setitem__((torch.arange(N), torch.arange(N)), True),
    "setitem of a tensor": lambda m: m.__setitem__(slice(2, 9), near()[2:9]),
    "setitem with a step": lambda m: m.__setitem__((slice(None, None, 3), slice(1, None, 2)), True),
    "setitem of an ellipsis": lambda m: m.__setitem__((..., 0), True),
    "fill_": lambda m: m[:3].fill_(True),
    "zero_": lambda m: (m.copy_(near()), m[:, 2].zero_()),
    "copy_": lambda m: m.copy_(near()),
    "copy_ of a row": lambda m: m[3].copy_(torch.arange(N) < 4),
    "masked_fill_": lambda m: m.masked_fill_(near(), True),
    "index_fill_": lambda m: m.index_fill_(0, torch.tensor([1, 5]), True),
    "index_copy_": lambda m: m.index_copy_(0, torch.tensor([1, 5]), near()[:2]),
    "index_put_": lambda m: m.index_put_((torch.arange(N), torch.arange(N)), torch.tensor(True)),
    "scatter_": lambda m: m.scatter_(1, (rows() + 1) % N, True),
    "scatter_ of a tensor": lambda m: m.scatter_(1, rows(), near()[:, :1]),
    "masked_scatter_": lambda m: m.masked_scatter_(near(), torch.ones(N, N, dtype=torch.bool)),
    "fill_diagonal_": lambda m: m.fill_diagonal_(True),
    "logical_or_": lambda m: m.logical_or_(near()),
    "logical_and_": lambda m: m.copy_(near()).logical_and_(keys() < 9),
    "logical_xor_": lambda m: m.logical_xor_(near()),
    "logical_not_": lambda m: m[:5].logical_not_(),
    "bitwise_or_": lambda m: m.bitwise_or_(near()),
    "bitwise_xor_": lambda m: m.bitwise_xor_(near()),
    "bitwise_not_": lambda m: m[1:4].bitwise_not_(),
    "bitwise_and_": lambda m: m.copy_(near()).bitwise_and_(keys() < 9),
    "__ior__": lambda m: m.__ior__(near()),
    "__ixor__": lambda m: m.__ixor__(near()),
    "__iand__": lambda m: (m.__ior__(near()), m.__iand__(keys() < 9)),
    "eq_": lambda m: m.eq_(near()),
    "ne_": lambda m: m.ne_(near()),
    "tril_": lambda m: m.fill_(True).tril_(),
    "triu_": lambda m: m.fill_(True).triu_(2),
    "diagonal": lambda m: m.diagonal().fill_(True),
    "select": lambda m: m.select(1, 3).fill_(True),
    "narrow": lambda m: m.narrow(0, 2, 5).fill_(True),
    "view": lambda m: m.view(-1)[: N + 3].fill_(True),
    "reshape": lambda m: m.reshape(4, -1)[1].fill_(True),
    "transpose": lambda m: m.transpose(0, 1)[2].fill_(True),
    "T": lambda m: m.T[2].fill_(True),
    "mT": lambda m: m.mT[2:4].copy_(near()[2:4]),
    "unsqueeze": lambda m: m.unsqueeze(0)[0, 3].fill_(True),
    "chunk": lambda m: m.chunk(3)[1].fill_(True),
    "split": lambda m: torch.split(m, 5, dim=1)[2].fill_(True),
    "unbind": lambda m: m.unbind(0)[4].fill_(True),
    "detach": lambda m: m.detach()[3].fill_(True),
    "unfold": lambda m: m.unfold(0, 4, 4)[1].fill_(True),
    "flatten": lambda m: m.flatten()[5:40].fill_(True),
    "out": lambda m: torch.logical_or(m, near(), out=m),
    "out of a comparison": lambda m: torch.lt(rows(), keys(), out=m),
    "out into a view": lambda m: torch.lt(rows()[3:7], keys(), out=m[3:7]),
    "torch.fill_": lambda m: torch.fill_(m[2], True),
    "operator": lambda m: torch.ops.aten.fill_.Scalar(m[2], True),
    "loop": lambda m: [m[i, : i + 1].fill_(True) for i in range(6)],
    "contiguous of a whole": lambda m: m.contiguous()[3].fill_(True),
    "to of the same": lambda m: m.to(torch.bool)[3].fill_(True),
}


@pytest.mark.parametrize("name", TORCH)
def test_tensors_that_are_written_to(name: str) -> None:
    def masks() -> tuple[Tensor, ...]:
        m = torch.zeros(N, N, dtype=torch.bool)
        TORCH[name](m)
        return (m,)

    check(masks)


COPIES: dict[str, Callable[[Tensor], object]] = {
    "clone": lambda m: m.clone()[3].fill_(True),
    "contiguous of a view": lambda m: m.T.contiguous()[3].fill_(True),
    "to of another": lambda m: m.to(torch.uint8)[3].fill_(1),
    "index": lambda m: m[torch.tensor([1, 5])].fill_(True),
    "repeat": lambda m: m.repeat(2, 1)[3].fill_(True),
}


@pytest.mark.parametrize("name", COPIES)
def test_copies_that_are_written_to_leave_the_mask_alone(name: str) -> None:
    def masks() -> tuple[Tensor, ...]:
        m = near()
        COPIES[name](m)
        return (m,)

    (plan,) = check(masks)
    assert not plan.lifted.mask.uses_table
