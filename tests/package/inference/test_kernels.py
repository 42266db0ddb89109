"""Sparse products: every kernel gives what the dense matrix gives, and none warns."""

import subprocess
import sys

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from itop_prune.inference.kernels import KERNELS, ROW_KERNELS, Active


def matrix(density: float = 0.2) -> tuple[Tensor, Active]:
    """A matrix of 30 by 20 whose first and last rows are empty, and its active weights."""
    generator = torch.Generator().manual_seed(0)
    dense = torch.randn(30, 20, generator=generator) * (
        torch.rand(30, 20, generator=generator) < density
    )
    dense[0] = dense[-1] = 0
    rows, columns = dense.nonzero(as_tuple=True)
    starts = F.pad(torch.bincount(rows, minlength=30).cumsum(0), (1, 0)).int()
    return dense, Active(starts, columns.int(), dense[rows, columns], (30, 20))


@pytest.mark.parametrize("kernel", KERNELS)
@pytest.mark.parametrize("density", [0.0, 0.2, 1.0])
@pytest.mark.parametrize("columns", [None, 1, 7, 100])
@pytest.mark.parametrize("with_bias", [True, False])
def test_a_product_is_that_of_the_dense_matrix(
    kernel: str, density: float, columns: int | None, with_bias: bool
) -> None:
    dense, active = matrix(density)
    x = torch.randn(20) if columns is None else torch.randn(20, columns)
    bias = torch.randn(30) if with_bias else None
    expected = dense @ x
    if bias is not None:
        expected += bias if columns is None else bias[:, None]
    torch.testing.assert_close(KERNELS[kernel](active)(x, bias), expected)


@pytest.mark.parametrize("kernel", KERNELS)
def test_the_bias_is_not_written_into(kernel: str) -> None:
    _, active = matrix()
    bias, product = torch.randn(30), KERNELS[kernel](active)
    before = bias.clone()
    for x in (torch.randn(20), torch.randn(20, 3)):
        product(x, bias)
        assert torch.equal(bias, before)


@pytest.mark.parametrize("kernel", KERNELS)
@pytest.mark.parametrize("rows", [19, 21])
def test_other_inputs_than_the_matrix_takes_are_refused(kernel: str, rows: int) -> None:
    product = KERNELS[kernel](matrix()[1])
    with pytest.raises(RuntimeError):
        product(torch.randn(rows, 5), None)


@pytest.mark.parametrize("kernel", KERNELS)
def test_the_values_are_those_of_the_tensors_given(kernel: str) -> None:
    dense, active = matrix()
    product = KERNELS[kernel](active)
    active.values.mul_(2.0)
    x = torch.randn(20, 4)
    torch.testing.assert_close(product(x, None), 2.0 * dense @ x)


@pytest.mark.parametrize("kernel", ROW_KERNELS)
@pytest.mark.parametrize("density", [0.0, 0.2, 1.0])
@pytest.mark.parametrize("with_bias", [True, False])
def test_a_product_by_rows_is_that_of_the_dense_matrix(
    kernel: str, density: float, with_bias: bool
) -> None:
    dense, active = matrix(density)
    product, bias = ROW_KERNELS[kernel](active), torch.randn(30) if with_bias else None
    for rows in (0, 1, 7, 100):
        x = torch.randn(rows, 20)
        torch.testing.assert_close(product(x, bias), F.linear(x, dense, bias))
        wide = torch.randn(20, rows).t()
        torch.testing.assert_close(product(wide, bias), F.linear(wide, dense, bias))


@pytest.mark.parametrize("kernel", ROW_KERNELS)
@pytest.mark.parametrize("wrong", [{"inputs": 20}, {"inputs": -1}, {"starts": 1}, {"starts": -1}])
def test_weights_outside_of_the_matrix_are_refused_by_products_by_rows(
    kernel: str, wrong: dict[str, int]
) -> None:
    _, active = matrix()
    for name, number in wrong.items():
        places = getattr(active, name).clone()
        places[-1] = number if number < 1 or name == "inputs" else number + len(active.values)
        active = active._replace(**{name: places})
    product = ROW_KERNELS[kernel](active)
    for rows in (1, 7):
        with pytest.raises(RuntimeError, match=r"outside of its matrix; allowed .*: load that of"):
            product(torch.randn(rows, 20), None)


PROGRAM = """
import torch, itop_prune
from itop_prune.inference.kernels import Active, csr
one = torch.ones(1)
product = csr(Active(torch.tensor([0, 1]).int(), torch.tensor([0]).int(), one, (1, 1)))
product(torch.ones(1, 3), None)
"""


def test_the_first_csr_tensor_of_a_process_does_not_warn() -> None:
    found = subprocess.run(
        [sys.executable, "-W", "error", "-c", PROGRAM], capture_output=True, text=True, check=False
    )
    assert (found.returncode, found.stderr) == (0, "")
