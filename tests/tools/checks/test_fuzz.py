"""The fuzzers find nothing in some cases of each kind, and find faults that are planted."""

import random
from collections.abc import Mapping
from typing import Any

import pytest
from helpers.hostile_cases import lose_locks, reads_past_the_end
from itop_prune_tools.checks import fuzz, fuzz_files, fuzz_processes, fuzz_trainings
from itop_prune_tools.checks.fuzz_runner import Case, Outcome, problem_of, run_cases
from torch import Tensor

from itop_prune import ITOP, scheduler

CASES = {
    "kernels": 300,
    "files": 500,
    "recipes": 300,
    "trainings": 200,
    "disks": 2,
    "races": 3,
    "kills": 4,
}


@pytest.mark.slow
@pytest.mark.parametrize("kind", fuzz.KINDS)
def test_every_promise_holds_in_random_cases(kind: str) -> None:
    if kind == "disks" and not fuzz.may_mount():
        pytest.skip("this process may not mount a small disk")
    found = list(run_cases(fuzz.KINDS[kind].case, range(CASES[kind])))
    assert len(found) == CASES[kind]
    assert [outcome for outcome in found if outcome.problem] == []


# --- the command ---------------------------------------------------------------------------------


def test_one_case_by_its_seed(capsys: pytest.CaptureFixture[str]) -> None:
    assert fuzz.main(["--only", "files", "--seed", "3"]) == 0
    assert capsys.readouterr().out == "files 3: every promise holds\n"


@pytest.mark.slow
def test_cases_of_one_kind_end_with_a_table(capsys: pytest.CaptureFixture[str]) -> None:
    assert fuzz.main(["--only", "files", "--cases", "5", "--minutes", "5"]) == 0
    assert "files │     5 │        0" in capsys.readouterr().out


def test_a_failure_is_one_line_that_repeats_it(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def broken(case: Case, seeds: range, deadline: float) -> list[Any]:
        return [Outcome(seed, "lost" if seed == 8 else "") for seed in seeds]

    monkeypatch.setattr(fuzz, "run_cases", broken)
    assert fuzz.main(["--only", "files", "--first", "7", "--cases", "3"]) == 1
    told = capsys.readouterr().out
    assert "failed: python tools/fuzz.py --only files --seed 8: lost" in told


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--seed", "3"], "--seed needs the kind of its case"),
        (["--cases", "0"], "--cases is 0; allowed is above 0"),
        (["--minutes", "-1"], "--minutes is -1.0; allowed is above 0"),
    ],
)
def test_arguments_that_make_no_sense(
    arguments: list[str], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit, match="2"):
        fuzz.main(arguments)
    assert message in capsys.readouterr().err


# --- faults planted on purpose -------------------------------------------------------------------


def is_found(problem: str, case: Case, cases: int) -> bool:
    """Run cases in this process until one has this problem."""
    return any(problem in problem_of(case, seed) for seed in range(cases))


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")
def test_a_count_that_is_off_by_one_is_found(monkeypatch: pytest.MonkeyPatch) -> None:
    plan = scheduler.plan_changes

    def one_too_few(*arguments: Any) -> Mapping[str, tuple[int, int]]:
        return {name: (out, max(0, into - 1)) for name, (out, into) in plan(*arguments).items()}

    monkeypatch.setattr(scheduler, "plan_changes", one_too_few)
    assert is_found("the count has changed", fuzz_trainings.case, 10)


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")
def test_a_weight_that_grows_and_is_not_0_is_found(monkeypatch: pytest.MonkeyPatch) -> None:
    write = ITOP.write_mask

    def not_zero(itop: ITOP, before: Tensor, after: Tensor) -> Tensor:
        grown = after & ~before
        stayed = write(itop, before, after)
        itop.parameter.data[grown] = 1e-3
        return stayed

    monkeypatch.setattr(ITOP, "write_mask", not_zero)
    assert is_found("the parameter of moved weights is not 0", fuzz_trainings.case, 10)


@pytest.mark.slow
def test_a_checksum_that_nothing_looks_at_is_found(monkeypatch: pytest.MonkeyPatch) -> None:
    def as_it_stands(content: bytes) -> tuple[int, str]:
        found = fuzz_files.CHECKSUM.search(content)
        return (found.start(1), found[1].decode()) if found else (0, "")

    monkeypatch.setattr("itop_prune.files.small_files._checksum", as_it_stands)
    assert is_found("a damaged file was read with other", fuzz_files.case, 200)


@pytest.mark.slow
def test_checksums_of_a_checkpoint_that_nothing_looks_at_are_found(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(fuzz_files, "damage", lambda folder: "")
    assert is_found("and its checkpoint counts as whole", fuzz_files.case, 50)


@pytest.mark.slow
def test_a_kernel_that_reads_past_the_end_is_found() -> None:
    found = [outcome.problem for outcome in run_cases(reads_past_the_end, range(4))]
    assert "the process died: SIGSEGV" in found
    assert "" not in found


@pytest.mark.slow
def test_a_lost_lock_is_found() -> None:
    pytest.importorskip("fcntl")

    def case(seed: int) -> None:
        fuzz_processes.race(random.Random(seed), fuzz_processes.SETTINGS, lose_locks)

    found = (problem_of(case, seed) for seed in range(30))  # a race needs some luck
    assert any("trained to the end" in text or "for another reason" in text for text in found)
