"""Which layers a model is to lose: checked before weights are read, then chosen by the score that was asked for."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from prunus.calibration.fold_block import last_matrix, share_of_output
from prunus.checkpoint import Checkpoint
from prunus.machine_choice import choose_device, choose_dtype
from prunus.models import StreamedModel
from prunus.models.layers import LayerNumbers, fields_without, trial_choices
from prunus.settings_shrink import LayersSettings
from prunus.shrinking import LAYER_SCORES
from prunus.shrinking.angular_distance import angular_distance, least_distant_run
from prunus.shrinking.block_influence import block_influence, least_influential
from prunus.shrinking.greedy_kl import next_to_go
from prunus.steps.layer_choice import layer_budget
from prunus.steps.layer_distances import distances
from prunus.steps.layer_gradients import check_memory, taylor_sums
from prunus.steps.layer_greedy import Judge
from prunus.steps.shrink_shapes import new_config
from prunus.text.batches import TokenBatch

Saved = dict[str, Any]  # what an interrupted run goes on from

OTHER_ENGINES = (
    "its layers are of several kinds and no longer alternate as the family's do; transformers reads the kinds from "
    "layer_types in config.json, but an engine that goes by the numbers of layers runs this model wrong."
)


class LayersStep:
    """The settings, resolved for one model. Raises UserError for what cannot be.

    `dtype` is that of the forward pass, where the call that this is a part of has chosen it.
    """

    def __init__(self, settings: LayersSettings, checkpoint: Checkpoint, dtype: torch.dtype | None = None) -> None:
        device = choose_device(settings.device)
        width = int(checkpoint.config.get_text_config(decoder=True).hidden_size)
        dtype = dtype or choose_dtype(settings.dtype, device, width)
        self.settings = settings
        self.score = LAYER_SCORES[settings.score]
        self.model = StreamedModel(checkpoint, dtype=dtype, device=device)
        self.budget = layer_budget(settings, len(self.model.spec.blocks))
        LayerNumbers.found_in(self.model.block_keys(), self.model.spec.family)
        for kept in trial_choices(self.budget.depth, self.budget.removable, self.budget.count):
            fields_without(checkpoint.config, kept, trust_remote_code=checkpoint.trust_remote_code)
        if settings.fold:
            for before in self._may_take_over():
                last_matrix(self.model.spec.blocks[before])

    def _may_take_over(self) -> range:
        """The layers that can come to stand in front of a removed run."""
        removable = self.budget.removable
        return range(max(removable[0] - 1, 0), removable[-1])

    def check_memory(self, max_memory: int | None) -> None:
        """Raise UserError when the score would not fit into memory, before weights are read."""
        if self.score.needs == "gradients":
            check_memory(self.model, self.settings.length, max_memory)

    def check_fold(self, batch: TokenBatch) -> None:
        """Raise UserError when the architecture cannot fold: found out on one block, before hours are spent."""
        layer = self._may_take_over()[0]
        hidden_1TH = self.model.embed(batch.tokens_NT[:1])
        self.model.load_block(layer)
        share_of_output(self.model, layer, hidden_1TH)
        self.model.free_block(layer)

    def choose(self, batch: TokenBatch, saved: Saved, save: Callable[[], None], folder: Path) -> list[int]:
        """The layers that stay, ascending; what was found on the way is in `saved`, which `save` keeps."""
        if "kept" not in saved:
            choose = {
                "neighbours": self._by_influence,
                "run": self._by_run,
                "candidates": self._by_predictions,
                "gradients": self._by_gradients,
            }
            removed = choose[self.score.needs](batch, saved, save, folder)
            saved["kept"] = [layer for layer in range(self.budget.depth) if layer not in removed]
            save()
        kept: list[int] = saved["kept"]
        return kept

    def _by_influence(self, batch: TokenBatch, saved: Saved, _save: Callable[[], None], folder: Path) -> list[int]:
        saved["scores"] = distances(self.model, batch, 1, block_influence, folder)
        return least_influential(saved["scores"], self.budget.removable, self.budget.count)

    def _by_run(self, batch: TokenBatch, saved: Saved, _save: Callable[[], None], folder: Path) -> list[int]:
        saved["scores"] = distances(self.model, batch, self.budget.count, angular_distance, folder)
        return least_distant_run(saved["scores"], self.budget.removable, self.budget.count)

    def _by_gradients(self, batch: TokenBatch, saved: Saved, _save: Callable[[], None], folder: Path) -> list[int]:
        judged = slice(self.settings.judged)
        saved["scores"] = taylor_sums(
            self.model, TokenBatch(batch.tokens_NT[judged], batch.real_NT[judged], []), folder
        )
        return least_influential(saved["scores"], self.budget.removable, self.budget.count)

    def _by_predictions(self, batch: TokenBatch, saved: Saved, save: Callable[[], None], folder: Path) -> list[int]:
        judged = min(self.settings.judged, len(batch.tokens_NT))
        judge = Judge(model=self.model, batch=batch, judged=judged, fold=self.score.folds, folder=folder)
        rounds: list[dict[str, Any]] = saved.setdefault("scores", [])
        while len(rounds) < self.budget.count:
            removed = {found["removed"] for found in rounds}
            kept = [layer for layer in range(self.budget.depth) if layer not in removed]
            kl = judge.kl_without_each(kept, [layer for layer in kept if layer in self.budget.removable])
            rounds.append({"removed": next_to_go(kl), "kl": {str(layer): value for layer, value in kl.items()}})
            save()
        return [found["removed"] for found in rounds]

    def new_config(self, kept: list[int]) -> dict[str, Any]:
        """The content of config.json of the model that has only these layers."""
        return new_config(self.model, self.fields(kept))

    def fields(self, kept: list[int]) -> dict[str, Any]:
        """What the config says of the model that has only these layers."""
        checkpoint = self.model.checkpoint
        return fields_without(checkpoint.config, kept, trust_remote_code=checkpoint.trust_remote_code)

    def remarks(self, kept: list[int]) -> list[str]:
        """Said after the work."""
        kinds = getattr(self.model.config.get_text_config(decoder=True), "layer_types", None) or []
        return [OTHER_ENGINES] if len({kinds[layer] for layer in kept if kinds}) > 1 else []

    def hidden_sets(self, sequences: int) -> float:
        """How many sets of hidden states of all calibration sequences are on disk at once."""
        judged = min(self.settings.judged, sequences) / sequences
        scoring = {
            "neighbours": 3.0,
            "run": self.budget.count + 2.0,
            "candidates": (len(self.budget.removable) + 1) * judged + (5 if self.score.folds else judged),
            "gradients": (self.budget.depth + 3) * judged,  # in front of every layer, behind the last, fp32 gradients
        }[self.score.needs]
        return max(scoring, 4.0 if self.settings.fold else 0.0)
