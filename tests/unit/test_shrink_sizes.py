"""From what was asked along an axis to the units that stay: ratios are rounded, sizes are taken as they are."""

import pytest
from hypothesis import assume, given
from hypothesis import strategies as st

from prunus.errors import UserError
from prunus.settings_shrink import ShrinkSettings
from prunus.steps.shrink_sizes import MULTIPLES, units_left


@pytest.mark.parametrize(
    ("axis", "wish", "units", "multiple_of", "expected"),
    [
        ("ffn", 0.75, 1536, None, 1152),  # 1152 is no multiple of 256 near enough, but of 128
        ("ffn", 0.734, 1536, None, 1152),
        ("ffn", 0.75, 8192, None, 6144),
        ("ffn", 1128, 1536, None, 1128),
        ("ffn", 1128, 1536, 64, 1152),
        ("ffn", 0.75, 1536, 1, 1152),
        ("ffn", 0.7, 100, None, 70),  # 100 divides by none of them
        ("kv_groups", 0.67, 3, None, 2),
        ("kv_groups", 0.2, 3, None, 1),
        ("experts", 0.75, 64, None, 48),
        ("ffn", 1.0, 1536, None, 1536),
    ],
)
def test_how_many_stay(axis, wish, units, multiple_of, expected):
    assert units_left(axis, wish, units, multiple_of) == expected


def test_the_architecture_s_own_grain_is_kept():
    assert units_left("hidden", 0.9, 576, None, 9) % 9 == 0
    assert units_left("hidden", 0.01, 576, None, 9) == 9


@given(st.floats(0.01, 1), st.integers(1, 64).map(lambda n: 32 * n))
def test_rounding_moves_a_ratio_by_at_most_a_twentieth(ratio, units):
    assume(round(ratio * units))
    left = units_left("ffn", ratio, units, None)
    assert 1 <= left <= units
    assert abs(left - ratio * units) <= max(0.05 * ratio * units, 1)
    if left % 32 == 0 and left:
        assert any(units % m == 0 for m in MULTIPLES)


def test_what_is_not_there_is_refused():
    with pytest.raises(UserError, match="ffn=2000 was asked for, but the model has 1536"):
        units_left("ffn", 2000, 1536, None)
    with pytest.raises(UserError, match=r"ffn=0.01 of 1536 leaves 0, rounded to a multiple of 256.*--multiple-of"):
        units_left("ffn", 0.01, 1536, 256)
    with pytest.raises(UserError, match=r"kv_groups=0\.1 of 3 leaves 0"):
        units_left("kv_groups", 0.1, 3, None)


@pytest.mark.parametrize(
    ("settings", "sentence"),
    [
        ({}, "nothing to shrink"),
        ({"ffn": 0}, "ffn=0 leaves nothing"),
        ({"ffn": 1.5}, "ratio that stays"),
        ({"ffn": 0.0}, "ratio that stays"),
        ({"ffn": 0.5, "score": "magic"}, "unknown score 'magic'"),
        ({"experts": 0.5, "expert_score": "magic"}, "unknown expert score 'magic'"),
        ({"depth": 0.5}, "unknown setting 'depth'"),
    ],
)
def test_settings_that_make_no_sense(settings, sentence):
    with pytest.raises(UserError, match=sentence):
        ShrinkSettings.check(**settings)
