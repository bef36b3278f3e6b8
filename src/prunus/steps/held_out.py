"""What judges whether a way to spread a cut over layers is worth taking: KL to the dense model on held-out text.

Allocations that help one method or model hurt another, so one is only accepted where this says so.
"""

from collections.abc import Sequence
from pathlib import Path

from prunus.calibration import StreamedSource
from prunus.errors import UserError
from prunus.evaluation.evaluate import mean_kl
from prunus.models import StreamedModel, open_model
from prunus.settings import CalibratedSettings
from prunus.steps.calibration_text import calibration_batch
from prunus.text.batches import TokenBatch

HELD_OUT = 8  # windows


def held_out_windows(model: StreamedModel, settings: CalibratedSettings) -> TokenBatch:
    """Calibration windows that pruning never sees: drawn beyond those it does. Raises UserError."""
    used = {tuple(row.tolist()) for row in calibration_batch(model, settings).tokens_NT}
    more = calibration_batch(model, settings, more=HELD_OUT)
    fresh = [n for n, row in enumerate(more.tokens_NT) if tuple(row.tolist()) not in used]
    if not fresh:
        raise UserError("the calibration text has no window left to judge an allocation on; give more text.")
    return spread(more, fresh)


def spread(batch: TokenBatch, candidates: Sequence[int]) -> TokenBatch:
    """HELD_OUT of the candidates, evenly spaced, since windows stand source after source."""
    step = max(len(candidates) / HELD_OUT, 1)
    chosen = [candidates[int(number * step)] for number in range(min(HELD_OUT, len(candidates)))]
    return TokenBatch(batch.tokens_NT[chosen], batch.real_NT[chosen], batch.description)


def held_out_kl(dense: StreamedModel, directory: Path, batch: TokenBatch, max_memory: int | None) -> float:
    """KL of the model in a directory to the dense one, mean nats per token. Raises UserError when it is NaN."""
    sparse = open_model(directory, dtype=dense.dtype, device=str(dense.device))
    sources = [StreamedSource(model, max_memory=max_memory) for model in (sparse, dense)]
    return mean_kl(sources[0], sources[1], batch.tokens_NT)
