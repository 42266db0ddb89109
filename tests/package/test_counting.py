"""Numbers of many tensors at once: the same whichever way they are counted."""

import pytest
import torch

from itop_prune import topology
from itop_prune.counting import active_in, count_each, fetched


@pytest.mark.parametrize("at_once", [{"cpu"}, set()], ids=["asks the device", "does not wait"])
def test_masks_are_counted_whatever_their_shape_and_layout(
    at_once: set[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(topology, "ANSWERS_AT_ONCE", at_once)
    conv = torch.zeros(2, 4, 3, 3, dtype=torch.bool).to(memory_format=torch.channels_last)
    conv[:, 1] = True
    masks = {
        "conv": conv,
        "row": torch.ones(300, dtype=torch.bool),
        "none": torch.zeros(0, 3, dtype=torch.bool),
    }
    assert count_each(masks) == {"conv": 18, "row": 300, "none": 0}
    assert active_in(masks["row"]).dtype == torch.int64  # more than a byte holds


def test_of_nothing_nothing_is_fetched() -> None:
    assert fetched({}) == count_each({}) == {}
