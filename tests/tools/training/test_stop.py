"""Signals: a run stops between two steps, on all ranks, and the handlers from before come back."""

import os
import signal
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from itop_prune_tools.training.stop import StopRequest


@pytest.fixture(autouse=True)
def _handlers() -> Iterator[None]:
    before = [(number, signal.getsignal(number)) for number in StopRequest.SIGNALS]
    yield
    for number, handler in before:
        signal.signal(number, handler)


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_is_a_request_to_stop_after_the_step(number: signal.Signals) -> None:
    with StopRequest() as stop:
        assert not stop.wanted()
        os.kill(os.getpid(), number)
        assert stop.wanted()
        assert stop.wanted()


def test_a_second_ctrl_c_interrupts() -> None:
    with StopRequest() as stop:
        os.kill(os.getpid(), signal.SIGINT)
        assert stop.wanted()
        with pytest.raises(KeyboardInterrupt):
            os.kill(os.getpid(), signal.SIGINT)


def test_a_second_sigterm_does_not_kill_what_is_being_written() -> None:
    """A launcher and the user may both send one."""
    with StopRequest() as stop:
        os.kill(os.getpid(), signal.SIGTERM)
        os.kill(os.getpid(), signal.SIGTERM)
        assert stop.wanted()


@pytest.mark.parametrize("fails", [False, True])
@pytest.mark.parametrize("received", [False, True])
def test_the_handlers_from_before_come_back(fails: bool, received: bool) -> None:
    def mine(number: int, frame: Any) -> None: ...

    signal.signal(signal.SIGTERM, mine)
    before = [signal.getsignal(number) for number in StopRequest.SIGNALS]
    try:
        with StopRequest():
            assert all(signal.getsignal(number) not in before for number in StopRequest.SIGNALS)
            if received:
                os.kill(os.getpid(), signal.SIGINT)
            if fails:
                raise ValueError
    except ValueError:
        pass
    assert [signal.getsignal(number) for number in StopRequest.SIGNALS] == before


@pytest.mark.parametrize(
    ("this", "other"), [(False, False), (False, True), (True, False), (True, True)]
)
def test_one_rank_asked_to_stop_stops_all(
    monkeypatch: pytest.MonkeyPatch, this: bool, other: bool
) -> None:
    def all_reduce(tensor: torch.Tensor, operation: object, group: object) -> None:
        assert group == "between hosts"
        tensor.clamp_(min=int(other))

    ended: list[object] = []
    monkeypatch.setattr(torch.distributed, "new_group", lambda backend: "between hosts")
    monkeypatch.setattr(torch.distributed, "all_reduce", all_reduce)
    monkeypatch.setattr(torch.distributed, "destroy_process_group", ended.append)
    with StopRequest(ranks=2) as stop:
        if this:
            os.kill(os.getpid(), signal.SIGTERM)
        assert stop.wanted() == (this or other)
    assert ended == ["between hosts"]
