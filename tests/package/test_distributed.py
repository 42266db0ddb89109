"""What one rank finds in its layers; `tests/promises/test_ranks.py` has several ranks."""

import math

import pytest
import torch
from torch import nn

from itop_prune.distributed import (
    RanksDiffer,
    check_equal,
    check_equal_masks,
    checksum,
    inspect,
    is_first,
    mean,
    world_size,
)


def test_without_torch_distributed_there_is_one_rank_that_is_equal_to_itself() -> None:
    assert (world_size(), is_first()) == (1, True)
    check_equal_masks({"a": torch.ones(2, dtype=torch.bool)})
    check_equal({"a": torch.tensor(math.nan)}, "do something")
    assert issubclass(RanksDiffer, RuntimeError)
    gradient = torch.ones(2, 3)
    assert mean(gradient) is gradient


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
@pytest.mark.parametrize("memory_format", [torch.contiguous_format, torch.channels_last])
def test_one_number_of_any_size_decides_what_is_zero_and_what_is_not_finite(
    dtype: torch.dtype, memory_format: torch.memory_format
) -> None:
    counts = {"a": torch.tensor(48), "b": torch.tensor(3)}
    other = nn.Parameter(torch.ones(5))
    for number in (0.0, 1e-30, 1e30, 1.0, -1.0, math.inf, -math.inf, math.nan):
        one = torch.zeros(3, 4, 2, 2, dtype=dtype).to(memory_format=memory_format)
        one[2, 1, 0, 1] = number
        parameter = nn.Parameter(torch.ones_like(one))
        parameter.grad, other.grad = one.clone(), torch.ones(5)
        parameters = {"a": parameter, "b": other}
        found = inspect(parameters, counts, None)
        assert found.finite == math.isfinite(number)
        assert found.zero_gradient == (["a"] if number == 0.0 else [])
        assert found.active == {"a": 48, "b": 3}

        with torch.no_grad():
            parameter.copy_(one)
        parameter.grad = other.grad = None
        assert inspect(parameters, counts, None).finite == math.isfinite(number)


def test_the_dense_gradient_decides_if_growth_needs_it() -> None:
    counts = {name: torch.tensor(4) for name in "ab"}
    parameters = {name: nn.Parameter(torch.ones(4)) for name in "ab"}
    for parameter in parameters.values():
        parameter.grad = torch.ones(4)
    found = inspect(parameters, counts, {"a": torch.zeros(4), "b": None})
    assert found.has_gradient == {"a": True, "b": False}
    assert found.zero_gradient == ["a"]
    assert found.any_gradient
    assert not inspect(parameters, counts, {"a": torch.full((4,), math.inf), "b": None}).finite

    parameters["a"].grad = None
    found = inspect(parameters, counts, None)
    assert (found.has_gradient, found.zero_gradient) == ({"a": False, "b": True}, [])
    parameters["b"].grad = torch.zeros(4)
    assert not inspect(parameters, counts, None).any_gradient


def test_a_checksum_taken_in_parts_is_that_of_the_whole(monkeypatch: pytest.MonkeyPatch) -> None:
    tensor = torch.randn(1000, generator=torch.Generator().manual_seed(0))
    expected = checksum(tensor)
    monkeypatch.setattr("itop_prune.distributed.CHUNK", 99)
    assert checksum(tensor) == expected
    tensor[99] = 0.0
    assert checksum(tensor) != expected
