"""Linear layers in torch's semi-structured form: what is handed to torch, and what is refused before."""

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional

from itop_prune.inference.semi_structured import semi_structured


def layer() -> nn.Linear:
    made = nn.Linear(8, 3).requires_grad_(False)
    made.weight *= torch.tensor([1.0, 0.0, 0.0, 1.0, 0.0, 1.0, 1.0, 0.0])
    return made


def test_the_weight_is_handed_over_and_the_layer_left_as_it_was(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.sparse, "to_sparse_semi_structured", lambda weight: 2 * weight)
    dense = layer()
    before = dense.weight.clone()
    new = semi_structured(dense)
    assert torch.equal(new.weight, 2 * before)
    assert torch.equal(dense.weight, before)
    assert new.bias is dense.bias
    assert not new.weight.requires_grad


def test_an_input_with_gaps_is_closed_up_before_the_kernel_reads_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.sparse, "to_sparse_semi_structured", torch.clone)
    linear, seen = functional.linear, []
    monkeypatch.setattr(functional, "linear", lambda x, *rest: seen.append(x.is_contiguous()) or linear(x, *rest))
    dense, wide = layer(), torch.randn(5, 20)
    new = semi_structured(dense)
    for x in (wide[:, 3:11], wide[:1, :8].expand(4, -1), wide.t()[:8].t()):
        seen.clear()
        y = new(x)
        assert seen == [True]
        assert torch.equal(y, dense(x.contiguous()))


def test_fewer_than_two_of_four_are_taken_and_more_are_not(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.sparse, "to_sparse_semi_structured", torch.clone)
    dense = layer()
    dense.weight[1] = 0
    semi_structured(dense)
    dense.weight[1, :3] = 1.0
    with pytest.raises(RuntimeError, match=r"\(3, 8\) does not hold the pattern 2:4"):
        semi_structured(dense)
    with pytest.raises(RuntimeError, match=r"\(3, 6\) does not hold"):
        semi_structured(nn.Linear(6, 3))


def test_what_torch_says_of_its_prototype_is_not_said_again(monkeypatch: pytest.MonkeyPatch) -> None:
    def convert(weight: Tensor) -> Tensor:
        torch.sparse.semi_structured.warnings.warn(
            "The PyTorch API of SparseSemiStructuredTensor is in prototype stage", UserWarning, stacklevel=2
        )
        return weight

    monkeypatch.setattr(torch.sparse, "to_sparse_semi_structured", convert)
    semi_structured(layer())  # a warning would be an error here
