"""Cases for the runner of the fuzzers, imported in its processes; so they are quick to import."""

import os
import signal
import time

from itop_prune_tools.checks.fuzz_runner import Broken


def of_every_kind(seed: int) -> None:
    """Hold, break, fail, die, hang or exit, by the seed."""
    if seed == 1:
        raise Broken("two\nlines")
    if seed == 2:
        raise KeyError("absent")
    if seed == 3:
        os.kill(os.getpid(), signal.SIGSEGV)
    if seed == 4:
        time.sleep(600)
    if seed == 5:
        os._exit(7)


def reads_past_the_end(seed: int) -> None:
    """Compute with kernels that take their input to begin one number later than it does."""
    from itop_prune_tools.checks import fuzz_kernels

    from itop_prune.kernels import runtime

    run = runtime.run

    def shifted(kernel: object, threads: int, kind: object, *arguments: int) -> None:
        run(kernel, threads, kind, arguments[0] + 8, *arguments[1:])

    runtime.run = shifted
    try:
        fuzz_kernels.case(seed)
    finally:
        runtime.run = run


def lose_locks() -> None:
    """Let this process lock nothing."""
    import fcntl

    fcntl.flock = lambda handle, operation: None
