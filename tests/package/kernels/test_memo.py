"""A value is remembered for a tensor until the tensor or the key changes, or the tensor goes."""

import torch

from itop_prune.kernels.memo import Memo


def test_a_value_is_known_for_its_tensor_and_key_alone() -> None:
    memo: Memo[str] = Memo()
    tensor = torch.zeros(3)
    assert memo.get(tensor, 1) is None
    assert memo.put(tensor, 1, "first") == "first"
    assert memo.get(tensor, 1) == "first"
    assert memo.get(tensor, 2) is None
    assert memo.get(tensor.clone(), 1) is None
    memo.put(tensor, 2, "second")
    assert (memo.get(tensor, 1), memo.get(tensor, 2), len(memo)) == (None, "second", 1)


def test_it_is_forgotten_when_the_tensor_changes_or_goes() -> None:
    memo: Memo[str] = Memo()
    tensor = torch.zeros(3)
    memo.put(tensor, 1, "value")
    tensor[1:].add_(1)
    assert memo.get(tensor, 1) is None
    del tensor
    assert len(memo) == 0


def test_of_a_tensor_whose_changes_can_not_be_seen_nothing_is_remembered() -> None:
    memo: Memo[str] = Memo()
    with torch.inference_mode():
        tensor = torch.zeros(3)
    assert memo.put(tensor, 1, "value") == "value"
    assert memo.get(tensor, 1) is None
