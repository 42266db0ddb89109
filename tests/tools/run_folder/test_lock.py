"""The lock of a run folder: of one process at a time, and no longer than that process lives."""

import multiprocessing
import os
import signal
from multiprocessing.connection import Connection
from pathlib import Path

import pytest
from itop_prune_tools.run_folder.lock import locked

pytest.importorskip("fcntl")


def is_free(folder: Path) -> bool:
    try:
        with locked(folder):
            return True
    except BlockingIOError:
        return False


def test_a_folder_is_locked_until_the_context_ends(tmp_path: Path) -> None:
    with locked(tmp_path):
        assert not is_free(tmp_path)
    assert is_free(tmp_path)
    with pytest.raises(KeyboardInterrupt), locked(tmp_path):
        raise KeyboardInterrupt
    assert is_free(tmp_path)


def test_two_folders_are_locked_apart(tmp_path: Path) -> None:
    (tmp_path / "other").mkdir()
    with locked(tmp_path):
        assert is_free(tmp_path / "other")


def hold(folder: Path, pipe: Connection) -> None:
    """Hold the lock, and start a worker that reports its number."""
    with locked(folder):
        if os.fork() == 0:
            pipe.send(os.getpid())
        signal.pause()


def test_a_killed_process_frees_the_folder_although_its_worker_lives(tmp_path: Path) -> None:
    fork = multiprocessing.get_context("fork")
    ours, theirs = fork.Pipe()
    holder = fork.Process(target=hold, args=(tmp_path, theirs))
    holder.start()
    assert ours.poll(10)
    worker = ours.recv()
    assert not is_free(tmp_path)

    holder.kill()
    holder.join()
    free = is_free(tmp_path)
    os.kill(worker, signal.SIGKILL)  # it lived until now
    assert free


def test_the_end_of_a_worker_frees_nothing(tmp_path: Path) -> None:
    with locked(tmp_path):
        worker = multiprocessing.get_context("fork").Process(target=os.getpid)
        worker.start()
        worker.join()
        assert not is_free(tmp_path)
