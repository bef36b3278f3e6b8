"""Hidden states of the dense model between its layers, made as they are asked for and let go when they are not needed.

Boundary l is what enters layer l; the last boundary is what leaves the last layer.

Shapes: N = sequences, T = tokens, H = hidden.
"""

from collections.abc import Callable
from pathlib import Path

from prunus.calibration.block_pass import BlockPass
from prunus.calibration.hidden_states import HiddenStates
from prunus.calibration.streamed_source import embed_all, hidden_shape
from prunus.models import StreamedModel
from prunus.text.batches import TokenBatch


class DenseStream:
    """Walks once through the model, forwards. What it holds lives in memory-mapped files `hidden-dense-*` in `folder`.

    A boundary that was asked for stays until `forget_before`; those passed over on the way to another are not kept.
    """

    def __init__(
        self,
        model: StreamedModel,
        batch: TokenBatch,
        folder: Path,
        advance: Callable[[int], None] = lambda _steps: None,
    ) -> None:
        self._folder, self._dtype = folder, model.dtype
        self._shape = hidden_shape(model, batch.tokens_NT)
        self._run = BlockPass(model=model, real_NT=batch.real_NT, edit=None, advance=advance)
        self._held: dict[int, HiddenStates] = {}
        self._asked: set[int] = set()
        self._spare: list[HiddenStates] = []
        self._made = 0
        self._reached = 0
        self._held[0] = self._room()
        embed_all(model, batch.tokens_NT, self._held[0])
        model.free_outer()

    def at(self, boundary: int) -> HiddenStates:
        """The hidden states (N, T, H) there; further back than before only where they were asked for before."""
        self._asked.add(boundary)
        while self._reached < boundary:
            hidden_in, hidden_out = self._held[self._reached], self._room()
            self._run.run_block(self._reached, hidden_in, hidden_out)
            if self._reached not in self._asked:
                self._let_go(self._reached)
            self._reached += 1
            self._held[self._reached] = hidden_out
        return self._held[boundary]

    def forget_before(self, boundary: int) -> None:
        """Let go of what lies before a boundary, except for what the walk goes on from."""
        for earlier in [held for held in self._held if held < boundary]:
            self._asked.discard(earlier)
            if earlier != self._reached:
                self._let_go(earlier)

    def _let_go(self, boundary: int) -> None:
        self._spare.append(self._held.pop(boundary))

    def _room(self) -> HiddenStates:
        if self._spare:
            return self._spare.pop()
        self._made += 1
        return HiddenStates(self._shape, self._dtype, self._folder / f"hidden-dense-{self._made}")
