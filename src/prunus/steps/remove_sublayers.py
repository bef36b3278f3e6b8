"""Remove attention alone, or MLPs alone, from the blocks that need them least (`prunus shrink --attention`, `--mlp`).

A block without one lets the residual pass it by; its tensors are not in the result. No config says such a thing, so the
result is of the tier that plain transformers and engines do not open.

Letters: T = tokens, H = hidden.
"""

from dataclasses import asdict
from typing import Any

import torch
from torch import Tensor

from prunus.calibration import HiddenStates, embed_all, hidden_shape
from prunus.calibration.block_pass import Propagate
from prunus.checkpoint.per_layer import KEY, OPENED_BY, WITHOUT
from prunus.errors import UserError
from prunus.models import StreamedModel
from prunus.models.axes import shapes_of
from prunus.models.configs import changed_config
from prunus.models.footprint import footprint
from prunus.models.sublayers import KINDS, Sublayer, silenced, stated
from prunus.progress import progress
from prunus.settings_shrink import ShrinkSettings
from prunus.shrinking.block_influence import block_influence
from prunus.shrinking.sublayer_influence import least_influential_sublayers
from prunus.steps.layer_choice import budget
from prunus.steps.layer_distances import check_finite
from prunus.steps.shrink_observed import NoEdit
from prunus.steps.shrink_shapes import new_config
from prunus.text.batches import TokenBatch

TIER = f"some blocks of this result have no attention or no MLP: {OPENED_BY}."
Gone = dict[str, list[int]]  # kind -> the layers that lose it


class SublayerStep:
    """A `BlockStep`. Raises UserError for what cannot be."""

    title = "Write blocks"
    verb = "shrink"
    prepares = True
    needs = ()
    propagate: Propagate = "sparse"
    edits_head = False
    sizes = None

    def __init__(self, settings: ShrinkSettings, model: StreamedModel) -> None:
        self.settings, self.model = settings, model
        self.notices: list[str] = []
        self.of_call: dict[str, Any] = {}  # what the record says of the whole call
        depth = len(model.spec.blocks)
        protected = (settings.protect_first, settings.protect_last)
        self.budgets = {kind: budget(kind, wish, depth, *protected) for kind, wish in settings.sublayers.items()}
        self._check_room()
        self.sublayers: list[dict[str, Sublayer]] = model.sublayers()
        self._gone: Gone = {}

    def _check_room(self) -> None:
        removable = min(len(budget.removable) for budget in self.budgets.values())
        going = sum(budget.count for budget in self.budgets.values())
        if going > removable:
            asked = " and ".join(f"{kind}={wish}" for kind, wish in self.settings.sublayers.items())
            raise UserError(
                f"{asked} would take {going} sublayers from {removable} layers that are not protected, one from each "
                "at most: a layer without both is a layer less, which --layers takes; keep more."
            )

    @property
    def removable(self) -> tuple[int, ...]:
        return next(iter(self.budgets.values())).removable

    @property
    def expected(self) -> Gone:
        """What stands for the choice before it is made: the layers in front."""
        order, gone = list(self.removable), Gone()
        for kind, found in self.budgets.items():
            gone[kind], order = order[: found.count], order[found.count :]
        return gone

    def prepare(self, batch: TokenBatch, rows: list[dict[str, Any]]) -> None:
        """Watch the model on the text and choose; an interrupted run finds its choice in `rows`."""
        if rows:
            return
        found = influences(self.model, self.sublayers, batch)
        counts = {kind: budget.count for kind, budget in self.budgets.items()}
        gone = least_influential_sublayers(found, self.removable, counts)
        rows += [{"axis": kind, "removed": gone[kind], "scores": found[kind]} for kind in counts]

    def edit(self, rows: list[dict[str, Any]]) -> NoEdit:
        self._gone = {row["axis"]: row["removed"] for row in rows}
        return NoEdit()

    def finished(self, index: int, state: dict[str, Tensor]) -> dict[str, Tensor]:
        """The block's tensors but for those of the sublayer that goes."""
        going = tuple(f"{name}." for name in self._modules(index, self._gone))
        return {name: tensor for name, tensor in state.items() if not going or not name.startswith(going)}

    def _modules(self, layer: int, gone: Gone) -> list[str]:
        spec, found = self.model.spec.blocks[layer], self.sublayers[layer]
        return [spec.full(found[kind].module) for kind, layers in gone.items() if layer in layers]

    def stored(self, tensors: dict[str, Tensor]) -> dict[str, Tensor]:
        return tensors

    def outer(self, state: dict[str, Tensor]) -> dict[str, Tensor]:
        return state

    def config(self) -> dict[str, Any]:
        return new_config(self.model, self.fields(self._gone))

    def fields(self, gone: Gone) -> dict[str, Any]:
        """What the config says of the model without these."""
        layers = []
        for layer, found in enumerate(self.sublayers):
            missing = {kind: found[kind] for kind in KINDS if layer in gone.get(kind, [])}
            layers.append({WITHOUT: stated(missing)} if missing else {})
        return {KEY: layers}

    def remarks(self, rows: list[dict[str, Any]]) -> list[str]:
        return [TIER]

    def facts(self, rows: list[dict[str, Any]], num_zeros: int) -> dict[str, Any]:
        gone = {row["axis"]: row["removed"] for row in rows}
        scores = {row["axis"]: row["scores"] for row in rows}
        return {**self.shapes(gone), "scores": scores, **self.of_call}

    def shapes(self, gone: Gone) -> dict[str, Any]:
        """How many blocks have which sublayer and what the model weighs, before and after."""
        model, config = self.model, changed_config(self.model.config, self.fields(gone))
        depth = len(model.spec.blocks)
        return {
            "axes": {
                kind: {"asked": wish, "before": depth, "after": depth - len(gone[kind]), "removed": gone[kind]}
                for kind, wish in self.settings.sublayers.items()
            },
            "before": asdict(footprint(model, shapes_of(model.config), model.config)),
            "after": asdict(footprint(model, shapes_of(config), config)),
        }


@torch.no_grad()
def influences(model: StreamedModel, sublayers: list[dict[str, Sublayer]], batch: TokenBatch) -> dict[str, list[float]]:
    """Influence of attention and MLP of each block, mean over all tokens. Raises UserError when one is NaN."""
    hidden = HiddenStates.scratch(hidden_shape(model, batch.tokens_NT), model.dtype)
    embed_all(model, batch.tokens_NT, hidden)
    model.free_outer()
    found: dict[str, list[float]] = {kind: [] for kind in KINDS}
    with progress("Compare sublayers", len(sublayers) * len(batch.tokens_NT)) as advance:
        for index, of_block in enumerate(sublayers):
            model.load_block(index)
            sums = dict.fromkeys(KINDS, 0.0)
            for n, real_T in enumerate(batch.real_NT):
                before_1TH = hidden[n]
                with silenced(model.blocks[index], of_block["mlp"]):
                    between_1TH = model.run_block(index, before_1TH)
                after_1TH = model.run_block(index, before_1TH)
                real_T = real_T.to(after_1TH.device)
                pairs = ((before_1TH.to(after_1TH.device), between_1TH), (between_1TH, after_1TH))
                for kind, (x_1TH, y_1TH) in zip(KINDS, pairs, strict=True):
                    sums[kind] += float(block_influence(x_1TH[0], y_1TH[0])[real_T].double().sum())
                hidden[n] = after_1TH
                advance(1)
            model.free_block(index)
            for kind, total in sums.items():
                found[kind].append(total / int(batch.real_NT.sum()))
    check_finite([value for values in found.values() for value in values], model)
    return found
