"""A case that breaks, fails, dies or hangs is one line, and the next case runs all the same."""

import time

from helpers.hostile_cases import of_every_kind
from itop_prune_tools.checks.fuzz_runner import run_cases


def test_what_comes_of_cases_of_every_kind() -> None:
    found = list(run_cases(of_every_kind, range(7), patience=5.0))
    assert [outcome.seed for outcome in found] == list(range(7))
    problems = [outcome.problem for outcome in found]
    assert problems[:2] == ["", "two lines"]
    assert problems[2].startswith("unexpected KeyError: 'absent' (hostile_cases.py:")
    assert problems[3:] == [
        "the process died: SIGSEGV",
        "still running after 5 s",
        "the process died: exit status 7",
        "",
    ]


def test_no_case_begins_after_the_deadline() -> None:
    assert list(run_cases(of_every_kind, range(3), deadline=time.monotonic() - 1.0)) == []
