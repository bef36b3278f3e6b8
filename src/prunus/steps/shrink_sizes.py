"""From what a user asked along an axis to the number of units that stay."""

import math

from prunus.errors import UserError

WIDTHS = ("hidden", "ffn", "expert_ffn", "shared_ffn")  # what engines want in multiples
MULTIPLES = (256, 128, 64, 32)  # GGUF K-quants want 256; GPU kernels are fast from 64 on
MOST_MOVED = 0.05  # of what was asked


def units_left(axis: str, wish: int | float, units: int, multiple_of: int | None, grain: int = 1) -> int:
    """How many of `units` stay. A whole number is a size, a number with a decimal point a ratio.

    A ratio of a width is rounded to `multiple_of`; where that is None, to the largest of 256, 128, 64, 32 that divides
    the width as it is and moves the request by at most 5%; and always to the architecture's own `grain`. A size is
    taken as it is unless `multiple_of` is given. Raises UserError for a size that is not there.
    """
    wanted = wish if isinstance(wish, int) else wish * units
    if wanted > units:
        raise UserError(f"{axis}={wish} was asked for, but the model has {units}; take 1 to {units}, or a ratio.")
    if isinstance(wish, int) and (axis not in WIDTHS or multiple_of is None):
        return wish
    multiple = grain if axis not in WIDTHS else multiple_of or _borne(wanted, units, grain)
    size = _nearest(wanted, multiple)
    if not 0 < size <= units:
        raise UserError(
            f"{axis}={wish} of {units} leaves {size}, rounded to a multiple of {multiple}; ask for at least "
            f"{multiple}{' or lower --multiple-of' if multiple_of else ''}."
        )
    return size


def _borne(wanted: float, units: int, grain: int) -> int:
    """The largest multiple that the width is one of already and that moves the request by little."""
    multiples = (math.lcm(m, grain) for m in MULTIPLES if units % m == 0)
    return next((m for m in multiples if abs(_nearest(wanted, m) - wanted) <= MOST_MOVED * wanted), grain)


def _nearest(wanted: float, multiple: int) -> int:
    return round(wanted / multiple) * multiple
