"""Training steps of two processes on one machine: what DDP sends, and how long a step takes."""

import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

import torch
from torch import Tensor, distributed, multiprocessing
from torch.distributed.algorithms.ddp_comm_hooks import default_hooks
from torch.nn.parallel import DistributedDataParallel

import itop_prune

from .measure import Measured, Settings
from .memory import mlp

RANKS = 2
SIZES, BATCH = (3072, 1024, 512, 10), 64
SPARSITY = 0.98


def ranks(settings: Settings) -> Iterator[Measured]:
    """Compare two ranks of the MLP in sparse storage with two dense ones, a thread each."""
    steps = settings.rounds(25)
    with tempfile.TemporaryDirectory() as folder:
        multiprocessing.spawn(work, (folder, steps), nprocs=RANKS)
        found = torch.load(Path(folder) / "found")
    title = f"MLP, two ranks, {SPARSITY:.0%}"
    (ours, sent), (other, all_sent) = found["sparse"], found["dense"]
    yield Measured(f"{title}, a step", 0.3, ours=ours, other=other)
    yield Measured(f"{title}, sent in a step", 0.03, unit="B", ours=[sent], other=[all_sent])


def work(rank: int, folder: str, steps: int) -> None:
    """Train both models in turns on one rank; the first writes what it found."""
    torch.set_num_threads(1)
    distributed.init_process_group(
        "gloo", init_method=f"file://{folder}/init", rank=rank, world_size=RANKS
    )
    try:
        trainings = {"dense": Rank(None), "sparse": Rank(SPARSITY)}
        found: dict[str, tuple[list[float], int]] = {}
        seconds: dict[str, list[float]] = {name: [] for name in trainings}
        for round_ in range(steps + 2):
            for name, training in trainings.items():
                distributed.barrier()
                began = time.perf_counter()
                training.step()
                if round_ >= 2:
                    seconds[name].append(time.perf_counter() - began)
        for name, training in trainings.items():
            found[name] = seconds[name], training.sent // (steps + 2)
        if rank == 0:
            torch.save(found, Path(folder) / "found")
    finally:
        distributed.destroy_process_group()


class Rank:
    """The training of one rank."""

    def __init__(self, sparsity: float | None) -> None:
        torch.manual_seed(0)
        model = mlp(*SIZES)
        if sparsity:
            itop_prune.apply(model, sparsity, storage="sparse")
        self.sent = 0
        self.model = DistributedDataParallel(model)
        self.model.register_comm_hook(None, self.send)
        self.optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
        self.x = torch.randn(BATCH, SIZES[0])

    def send(self, group: object, bucket: distributed.GradBucket) -> torch.futures.Future[Tensor]:
        """Count the bytes of gradients, and average them as DDP does."""
        self.sent += bucket.buffer().nbytes
        return default_hooks.allreduce_hook(None, bucket)  # type: ignore[arg-type]

    def step(self) -> None:
        """Take a training step."""
        self.model(self.x).logsumexp(1).mean().backward()
        self.optimizer.step()
        self.optimizer.zero_grad()
