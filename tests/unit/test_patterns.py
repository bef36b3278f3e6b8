"""Patterns: reading, writing, exact counts, refusals in one clear sentence."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from prunus.errors import UserError
from prunus.sparsity import NM, Pattern, Tile, Unstructured, parse_pattern

SPARSITIES = st.floats(0, 1, exclude_max=True, allow_nan=False)
UNSTRUCTURED = st.builds(Unstructured, SPARSITIES, st.sampled_from([None, "row", "matrix"]))
NMS = st.integers(2, 40).flatmap(lambda of: st.builds(NM, st.integers(1, of - 1), st.just(of)))
TILES = st.builds(Tile, st.integers(1, 64), st.integers(1, 64), SPARSITIES)


@given(st.one_of(UNSTRUCTURED, NMS, TILES))
def test_text_round_trip(pattern: Pattern) -> None:
    assert parse_pattern(str(pattern)) == pattern
    assert parse_pattern(pattern) is pattern


def test_readable_text() -> None:
    assert parse_pattern(0.5) == parse_pattern("0.5") == parse_pattern(" .5 ") == Unstructured(0.5)
    assert parse_pattern("0.5@row") == Unstructured(0.5, "row")
    assert parse_pattern("2:4") == NM(keep=2, of=4)
    assert parse_pattern("16x8:0.8") == Tile(rows=16, cols=8, sparsity=0.8)
    assert str(Tile(16, 16, 0.8)) == "16x16:0.8"


@pytest.mark.parametrize("number", [124, 0, 1, -3, 488])
def test_integers_are_refused_with_the_yaml_trap(number: int) -> None:
    with pytest.raises(UserError, match=r"is an integer \(YAML reads an unquoted \d+:\d+ as \d+\): put .* in quotes"):
        parse_pattern(number)


def test_the_yaml_trap_names_what_was_written() -> None:
    with pytest.raises(UserError, match="unquoted 4:8 as 248"):
        parse_pattern(248)


WRONG = ["", "50%", "abc", "2:4:8", "-0.5", "nan", "1:", "0.5@", "0.5@layer", "16x16", "4x4:x", "٠.٥", None, True, []]


@pytest.mark.parametrize("text", WRONG)
def test_nonsense_is_refused(text: object) -> None:
    with pytest.raises(UserError, match="is not a pattern: allowed are"):
        parse_pattern(text)


@pytest.mark.parametrize("text", ["1.0", "1", "2:2", "0:4", "5:4", "0x4:0.5", "4x4:1.0", 1.0, -0.1, float("nan")])
def test_out_of_range_is_refused(text: object) -> None:
    with pytest.raises(UserError):
        parse_pattern(text)


@given(st.text(max_size=12))
def test_any_text_is_a_pattern_or_a_user_error(text: str) -> None:
    try:
        pattern = parse_pattern(text)
    except UserError:
        return
    assert parse_pattern(str(pattern)) == pattern


def test_check_names_the_matrix() -> None:
    with pytest.raises(UserError, match=r"2:4 does not fit layers\.0\.up: its 10 inputs"):
        NM(2, 4).check((8, 10), "layers.0.up")
    with pytest.raises(UserError, match=r"16x16:0\.5 does not fit gate: .* 8x64"):
        Tile(16, 16, 0.5).check((8, 64), "gate")
    Tile(4, 4, 0.5).check((5, 7), "ragged edges are fine")
    Unstructured(0.9).check((1, 1), "anything")


def test_counts() -> None:
    assert Unstructured(0.5, "row").num_pruned((3, 5)) == 3 * 2  # 2.5 goes to the even 2
    assert Unstructured(0.5, "matrix").num_pruned((3, 5)) == 8  # 7.5 to 8
    assert NM(1, 4).num_pruned((2, 8)) == 12
    assert Tile(4, 4, 0.5).num_pruned((8, 8)) == 32
    assert Tile(4, 4, 0.5).num_pruned_tiles((9, 9)) == 4  # 9 tiles, cut-off ones included


@given(st.integers(1, 10**8), st.integers(0, 10**8))
def test_a_count_over_the_size_reproduces_the_count(size: int, count: int) -> None:
    count %= size
    assert Unstructured(count / size, "matrix").num_pruned((1, size)) == count


def test_satisfied_by_is_exact() -> None:
    keep_OI = torch.tensor([[True, False, True, False], [False, True, True, False]])
    assert NM(2, 4).satisfied_by(keep_OI)
    assert not NM(1, 2).satisfied_by(keep_OI.roll(1, 1) | keep_OI)
    assert Unstructured(0.5, "row").satisfied_by(keep_OI)
    lopsided_OI = torch.tensor([[True, True, True, False], [False, True, False, False]])
    assert Unstructured(0.5, "matrix").satisfied_by(lopsided_OI)
    assert not Unstructured(0.5, "row").satisfied_by(lopsided_OI)
    assert not Tile(2, 2, 0.5).satisfied_by(keep_OI)
    assert Tile(2, 2, 0.5).satisfied_by(torch.tensor([[True, True, False, False]] * 2))
