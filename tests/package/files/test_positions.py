"""Positions of active weights as bytes and back: exact, short, refused if they are no mask."""

import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from itop_prune.files.positions import decode, encode, encode_gaps

BYTES = st.binary(max_size=40).map(lambda content: np.frombuffer(content, np.uint8))


def scattered(size: int, density: float, seed: int = 0) -> np.ndarray:
    """Draw a mask in which each weight is active with the same probability."""
    return np.random.default_rng(seed).random(size) < density


def assert_comes_back(mask: np.ndarray) -> None:
    encoding, code = encode(np.flatnonzero(mask), len(mask))
    assert code.dtype == np.uint8
    assert len(code) <= math.ceil(len(mask) / 8)
    positions = decode(encoding, code, len(mask))
    assert np.issubdtype(positions.dtype, np.signedinteger)
    assert np.array_equal(positions, np.flatnonzero(mask))


@given(st.integers(0, 4000), st.floats(0, 1), st.integers(0, 2**32))
def test_scattered_positions_come_back(size: int, density: float, seed: int) -> None:
    assert_comes_back(scattered(size, density, seed))


@given(st.lists(st.tuples(st.integers(0, 2000), st.integers(0, 40)), max_size=20))
def test_runs_with_gaps_of_every_size_come_back(runs: list[tuple[int, int]]) -> None:
    parts = [np.repeat([False, True], run) for run in runs]
    assert_comes_back(np.concatenate([np.zeros(0, bool), *parts]))


@pytest.mark.parametrize("at_end", [False, True])
@pytest.mark.parametrize("gap", [0, 1, 253, 254, 255, 256, 509, 510, 511, 100_000])
def test_gaps_about_each_number_of_skips_come_back(gap: int, at_end: bool) -> None:
    mask = np.zeros(3 * (gap + 1) + (0 if at_end else 5000), bool)
    mask[gap :: gap + 1][:3] = True
    assert_comes_back(mask)


def test_gaps_are_the_bytes_that_the_format_promises() -> None:
    code = encode_gaps(np.array([2, 0, 2, 254, 255, 1382]))
    assert code.tolist() == [2, 0, 2, 254, 255, 0, *[255] * 5, 1382 - 5 * 255]


def test_long_gaps_are_the_bytes_that_the_format_promises() -> None:
    active = np.array([5, 5 + 1 + 127, 5 + 1 + 127 + 1 + 128, 5 + 1 + 127 + 1 + 128 + 1 + 2**40])
    encoding, code = encode(active, 2**41)
    assert encoding == "long gaps"
    assert code.tolist() == [5, 127, 128, 1, 128, 128, 128, 128, 128, 32]
    assert decode(encoding, code, 2**41).tolist() == active.tolist()


def test_bits_are_the_bytes_that_the_format_promises() -> None:
    encoding, code = encode(np.array([2, 3, 6, 8]), 9)
    assert (encoding, code.tolist()) == ("bits", [4 + 8 + 64, 1])


@pytest.mark.parametrize(
    ("density", "encoding"),
    [(0.001, "long gaps"), (0.02, "gaps"), (0.1, "gaps"), (0.2, "bits")],
)
def test_the_shorter_encoding_is_taken(density: float, encoding: str) -> None:
    mask = scattered(100_000, density)
    found, code = encode(np.flatnonzero(mask), len(mask))
    assert found == encoding
    assert len(code) <= min(100_000 / 8, mask.sum() + 100_000 / 255, 2 * mask.sum())


@given(st.sampled_from(["gaps", "long gaps", "bits"]), BYTES, st.integers(0, 400))
def test_any_bytes_are_a_mask_or_refused(encoding: str, code: np.ndarray, size: int) -> None:
    try:
        positions = decode(encoding, code, size)
    except ValueError:
        return
    assert (np.diff(positions) > 0).all()
    assert ((positions >= 0) & (positions < size)).all()


@pytest.mark.parametrize(
    ("encoding", "code", "message"),
    [
        ("gaps", [7, 0], r"the gaps cover 9 weights of 8"),
        ("gaps", [255], r"the gaps cover 255 weights of 8"),
        ("long gaps", [7, 0], r"the gaps cover more than the 8 weights"),
        ("long gaps", [9], r"a gap covers 9 weights of 8"),
        ("long gaps", [128], r"the last gap has no end"),
        ("long gaps", [128] * 9 + [1], r"a gap takes more than 9 bytes"),
        ("bits", [1, 0], r"2 bytes of bits are not those of 8 weights"),
        ("bits", [], r"0 bytes of bits are not those of 8 weights"),
        ("runs", [1], r"'runs' is no encoding; known are gaps, long gaps, bits"),
    ],
)
def test_what_is_no_mask_is_refused(encoding: str, code: list[int], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        decode(encoding, np.array(code, np.uint8), 8)


def test_bits_beyond_the_last_weight_and_other_types_are_refused() -> None:
    with pytest.raises(ValueError, match="a bit beyond the last of 3 weights is 1"):
        decode("bits", np.array([8], np.uint8), 3)
    for code in (np.array([1.0]), np.array([[1]], np.uint8)):
        with pytest.raises(ValueError, match="not bytes in a row"):
            decode("gaps", code, 8)
