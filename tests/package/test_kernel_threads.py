"""Kernels leave the number of torch's threads as it is, from their first call on."""

import subprocess
import sys

CODE = """
import torch, itop_prune
torch.set_num_threads(1)
layer = torch.nn.Linear(64, 64)
itop_prune.apply(layer, 0.95, storage="sparse")
layer(torch.ones(2, 64))
print(torch.get_num_threads())
"""


def test_the_first_product_leaves_the_number_of_threads() -> None:
    found = subprocess.run([sys.executable, "-c", CODE], capture_output=True, text=True, check=True)
    assert found.stdout.strip() == "1"
