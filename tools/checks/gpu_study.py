"""Run what only a GPU can show: its tests, its benchmarks, and three trainings of ResNet-34.

  python tools/gpu_study.py cifar100.npz gpu_study             # about twelve minutes on one GPU
  python tools/gpu_study.py cifar100.npz gpu_study --dry-run   # check the recipes, on a CPU too

The trainings are dense, RigL-ITOP and sparse to sparser, at 98 % in sparse storage, in bf16,
compiled and with channels last. The folder gets their runs, the numbers of the benchmark, and a
picture of accuracy against R_s. CIFAR-100 is read from a .npz of arrays.
"""

import argparse
import os
import subprocess
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path

ROOT = Path(__file__).parents[2]
EPOCHS = 30
FAST = ("compile=true", "channels_last=true", "accelerator={mixed_precision: bf16}")
SHORT = ("lr_schedule={sched: poly, decay_rate: 1.0, step_on_epochs: false}",)
TO_SPARSER = (
    "masks={sparsity: 0.9, method: ERK, storage: sparse}",
    "regrow={every: 200, stop: 0.75, rate: 0.3, grow: sampled_gradient, gradient_steps: 5, "
    "scope: global, density: {power: 1.5}, final_sparsity: 0.98}",
)
RUNS: dict[str, tuple[str, tuple[str, ...]]] = {
    "dense": ("cifar100_resnet34_dense", ()),
    "rigl-itop": (
        "cifar100_resnet34_erk98_rigl-itop",
        ("masks.storage=sparse", "regrow.every=200"),
    ),
    "sparse-to-sparser": ("cifar100_resnet34_erk98_rigl-itop", TO_SPARSER),
}


def main(argv: Sequence[str] | None = None) -> int:
    """Run every command, whether or not one before failed; return 1 if any did."""
    args = parse(argv)
    args.out.mkdir(parents=True, exist_ok=True)
    failed = 0
    for command, environment in commands(args):
        print("+", " ".join(command), flush=True)
        failed += subprocess.run(command, cwd=ROOT, env=os.environ | environment).returncode != 0
    return int(failed > 0)


def parse(argv: Sequence[str] | None) -> argparse.Namespace:
    """Read the command line."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("data", type=Path, help="CIFAR-100 as .npz")
    parser.add_argument("out", type=Path, help="folder for what is found")
    parser.add_argument("--epochs", type=int, default=EPOCHS, help=f"of each run ({EPOCHS})")
    parser.add_argument("--dry-run", action="store_true", help="check the recipes, train nothing")
    args = parser.parse_args(argv)
    args.data, args.out = args.data.resolve(), args.out.resolve()
    return args


def commands(args: argparse.Namespace) -> Iterator[tuple[list[str], dict[str, str]]]:
    """Yield each command, and what it needs in its environment."""
    python = sys.executable
    if not args.dry_run:
        yield [python, "-m", "pytest", "-q", "tests/promises/test_gpu.py"], {"ITOP_GPU": "1"}
        found = ["--json", str(args.out / "bench.json")]
        only = ["--only", "step,update,memory"]
        yield [python, "tools/bench.py", "--device", "cuda", "--quick", *only, *found], {}

    data = f"data={{name: npz, root: {args.data}, batch_size: 128, validation: 5000}}"
    for name, (recipe, overrides) in RUNS.items():
        train = [python, "tools/train.py", f"recipes/{recipe}.yaml", data, f"epochs={args.epochs}"]
        fast = () if args.dry_run else FAST
        yield (
            [*train, *SHORT, *fast, *overrides]
            + (["--dry-run"] if args.dry_run else ["--out", str(args.out / name)]),
            {},
        )
    if not args.dry_run:
        runs = [str(args.out / name) for name in RUNS]
        yield [python, "tools/compare.py", *runs, "--picture", str(args.out / "study.svg")], {}
