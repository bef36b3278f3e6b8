"""Which layer the model can be without best, judged by its predictions without each of them, all in one walk.

The walk over the layers carries one set of hidden states of the model as it is and, from where a candidate would have
been run, one of the model without that candidate. So no layer is run twice on the same hidden states, and each is read
from disk once for all candidates.

Shapes: N = sequences that judge, T = tokens, H = hidden, V = vocabulary.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

import torch
from torch import Tensor

from prunus.calibration import HiddenStates, embed_all, hidden_shape
from prunus.calibration.dense_stream import DenseStream
from prunus.calibration.fold_block import LastMatrix, fit_folds, set_last_matrix
from prunus.evaluation.divergence import token_kl
from prunus.evaluation.source import POSITIONS_AT_ONCE, check_finite
from prunus.memory import release_freed_memory
from prunus.models import StreamedModel
from prunus.progress import progress
from prunus.shrinking.fold import Folded
from prunus.text.batches import TokenBatch


@dataclass(kw_only=True)
class Judge:
    """Judges candidates on the first `judged` sequences of the text; with `fold`, as they are after folding.

    Folds are fitted on the whole text. Hidden states live in files of `folder`.
    """

    model: StreamedModel
    batch: TokenBatch
    judged: int
    fold: bool
    folder: Path

    @torch.no_grad()
    def kl_without_each(self, kept: Sequence[int], candidates: Sequence[int]) -> dict[int, float]:
        """KL(dense || model of `kept` without the candidate), mean nats per token, for each candidate (ascending)."""
        dense_NTH = self._dense_final
        with progress("Judge layers", len(kept)) as advance:
            walk = _Walk(self, kept, candidates)
            for place in range(len(kept)):
                walk.step(place)
                advance(1)
        return {layer: self._kl(dense_NTH, walk.of(layer), layer) for layer in candidates}

    @cached_property
    def _dense_final(self) -> Tensor:
        """What leaves the dense model's last layer (N, T, H), the same for all rounds."""
        tokens_NT, real_NT = self.batch.tokens_NT[: self.judged], self.batch.real_NT[: self.judged]
        dense = DenseStream(self.model, TokenBatch(tokens_NT, real_NT, []), self.folder)
        return dense.at(len(self.model.spec.blocks)).states_NTH.clone()

    def _kl(self, dense_NTH: Tensor, without_NTH: Tensor, layer: int) -> float:
        each = [self._window_kl(n, dense_NTH, without_NTH) for n in range(self.judged)]
        kl = float(torch.cat(each).double().mean())
        check_finite({"KL": kl}, str(self.model.checkpoint.path), f"the calibration text, without layer {layer},")
        return kl

    def _window_kl(self, n: int, dense_NTH: Tensor, without_NTH: Tensor) -> Tensor:
        tokens_1T, real_T = self.batch.tokens_NT[n : n + 1], self.batch.real_NT[n]
        pieces = []
        for start in range(0, tokens_1T.shape[1], POSITIONS_AT_ONCE):
            at = slice(start, start + POSITIONS_AT_ONCE)
            logits = [self.model.logits(tokens_1T[:, at], h[n : n + 1, at])[0] for h in (dense_NTH, without_NTH)]
            pieces.append(token_kl(*logits).cpu())
        return torch.cat(pieces)[real_T]


class _Walk:
    """One walk over the layers that are left."""

    def __init__(self, judge: Judge, kept: Sequence[int], candidates: Sequence[int]) -> None:
        self._model, self._judged = judge.model, judge.judged
        self._kept, self._candidates = list(kept), list(candidates)
        self._behind = [*self._kept[1:], len(judge.model.spec.blocks)]  # for each place, the boundary that comes next
        fitted = len(judge.batch.tokens_NT) if judge.fold else judge.judged
        tokens_NT, self._real_NT = judge.batch.tokens_NT[:fitted], judge.batch.real_NT[:fitted]
        self._dense = DenseStream(judge.model, judge.batch, judge.folder) if judge.fold else None
        shape = hidden_shape(judge.model, tokens_NT)
        self._as_it_is = HiddenStates(shape, judge.model.dtype, judge.folder / "hidden-as-it-is")
        embed_all(judge.model, tokens_NT, self._as_it_is)
        wide = (len(candidates) * judge.judged, shape[1], shape[2])
        self._without = HiddenStates(wide, judge.model.dtype, judge.folder / "hidden-without")
        judge.model.free_outer()
        if self._kept[0] in self._candidates:
            self.of(self._kept[0]).copy_(self._as_it_is.states_NTH[: self._judged])

    def of(self, candidate: int) -> Tensor:
        """The hidden states (N, T, H) of the model without this candidate."""
        start = self._candidates.index(candidate) * self._judged
        return self._without.states_NTH[start : start + self._judged]

    def step(self, place: int) -> None:
        """Run the layer at this place: without the next one, for every candidate before, for the model as it is."""
        layer = self._kept[place]
        following = self._kept[place + 1] if place + 1 < len(self._kept) else None
        targets = self._targets(place, following)  # before the layer is loaded: the dense walk runs and frees it, too
        state = self._model.load_block(layer)
        folded, folded_further = self._folds(layer, targets)
        if following in self._candidates:
            self._use(layer, state, folded_further)
            self._open(layer, following)
        self._use(layer, state, folded)
        self._run(layer)
        self._model.free_block(layer)
        for states in (self._as_it_is, self._without):
            states.release()
        release_freed_memory()

    def _open(self, layer: int, candidate: int | None) -> None:
        assert candidate is not None
        without_NTH = self.of(candidate)
        for n in range(self._judged):
            without_NTH[n].copy_(self._model.run_block(layer, self._as_it_is[n])[0])

    def _run(self, layer: int) -> None:
        running = sum(candidate < layer for candidate in self._candidates) * self._judged  # candidates ascend
        for row in range(running):
            self._without[row] = self._model.run_block(layer, self._without[row])
        for n in range(len(self._real_NT)):
            self._as_it_is[n] = self._model.run_block(layer, self._as_it_is[n])

    def _targets(self, place: int, following: int | None) -> dict[str, HiddenStates]:
        """Where folds into this layer lead: behind the run that follows it, and further if the next layer goes too."""
        if self._dense is None:
            return {}
        behind = self._behind[place]
        wanted = {"run": behind} if behind > self._kept[place] + 1 else {}
        if following in self._candidates:
            wanted["further"] = self._behind[place + 1]
        targets = {name: self._dense.at(boundary) for name, boundary in wanted.items()}
        self._dense.forget_before(behind)
        return targets

    def _folds(self, layer: int, targets: dict[str, HiddenStates]) -> tuple[Folded | None, Folded | None]:
        if not targets:
            return None, None
        found = fit_folds(self._model, layer, self._as_it_is, self._real_NT, list(targets.values()))
        folds = dict(zip(targets, found, strict=True))
        return folds.get("run"), folds.get("further")

    def _use(self, layer: int, state: dict[str, Tensor], folded: Folded | None) -> None:
        if self._dense is not None:
            stored = LastMatrix.stored_in(self._model.spec.blocks[layer], state)
            set_last_matrix(self._model, layer, stored.folded(folded))
