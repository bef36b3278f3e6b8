"""What a user should hear before the work starts: which requests are known to end badly, and the way out."""

from collections.abc import Iterable

from prunus.sparsity import Pattern, Tile, Unstructured

# Measured on a small model without training afterwards, see docs/methods.md and docs/log.md.
HIGH_SPARSITY = 0.6

ZEROS_ALONE = (
    "zeros alone bring no speed: transformers and most engines multiply them like any other number; `prunus export "
    "--to sparse` packs them for the CPU."
)


def notices(patterns: Iterable[Pattern]) -> list[str]:
    """Return sentences, each with the reason; the first is always said."""
    distinct = sorted(set(patterns), key=str)
    return [ZEROS_ALONE, *(sentence for pattern in distinct if (sentence := _notice(pattern)))]


def _notice(pattern: Pattern) -> str | None:
    if isinstance(pattern, Tile) and pattern.sparsity > 0:
        return (
            f"tiles ({pattern}) pruned in one shot leave several times the output error of unstructured zeros, the "
            "smaller the tile the less (4x1 at 0.5 costs as much as 0.7 without tiles); plan to train afterwards, or "
            "take 2:4, which loses far less."
        )
    if isinstance(pattern, Unstructured) and pattern.sparsity > HIGH_SPARSITY:
        return f"{pattern} is much in one shot: the output error at 0.7 is three times that at 0.5."
    return None
