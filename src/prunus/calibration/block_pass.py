"""The one loop over decoder blocks: load a block, observe it, let an edit change it, run it, hand it on, free it.

Everything that calibrates is an edit given to this loop; evaluating a model too large for memory is this loop with no
edit. Memory is one block, the statistics of one stage, and as many waiting sequences as the budget allows; the others
wait on disk.

Shapes: N = sequences, T = tokens, H = hidden, O = out_features, I = in_features.
"""

from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass, field
from typing import Literal, Protocol

import torch
from torch import Tensor

from prunus.calibration.hidden_states import HiddenStates
from prunus.calibration.spill import SpillFiles
from prunus.calibration.staged_run import StagedRun, StageInputs, stops_at_stages
from prunus.calibration.statistics import Recorder
from prunus.errors import UserError
from prunus.memory import release_freed_memory
from prunus.models import StreamedModel
from prunus.models.spec import BlockSpec, Group, Stage
from prunus.sparsity.methods import Statistics

Propagate = Literal["sparse", "dense"]
Tensors = Mapping[str, Tensor]


class Edit(Protocol):
    """Changes the matrices of one group."""

    def needs_at(self, block: BlockSpec, stage: Stage) -> Collection[str] | None:
        """The statistics it wants of the inputs of a stage; None: nothing changes there, so nobody has to stop."""
        ...

    def __call__(
        self, block: BlockSpec, group: Group, weights_OI: list[Tensor], statistics: Statistics, tensors: Tensors
    ) -> list[Tensor]:
        """Return the new weights, in the order and dtype of `weights_OI`, which stay untouched.

        `tensors` are all of the block as they stand, under their full parameter names: to look at, and to change the
        biases of the group in place.
        """
        ...


WantedStages = list[tuple[Stage, Collection[str]]]


def _ignore(_steps: int) -> None:
    return None


@dataclass(kw_only=True)
class BlockPass:
    """Takes one block after the other through calibration and edit.

    `propagate="sparse"`: each stage sees the inputs it will really see, after everything before it was edited.
    `propagate="dense"`: statistics and hidden states are those of the unedited model.
    """

    model: StreamedModel
    real_NT: Tensor
    edit: Edit | None  # None: only run the block
    propagate: Propagate = "sparse"
    num_in_memory: int = 1  # sequences that wait for the next stage in memory, at least one; the others wait on disk
    spill_files: SpillFiles = field(default_factory=SpillFiles)
    advance: Callable[[int], None] = field(default=_ignore)  # progress, one step per sequence and block

    @torch.no_grad()  # out here, where the greenlets that take turns inside share it
    def run_block(self, index: int, hidden_in: HiddenStates, hidden_out: HiddenStates) -> dict[str, Tensor]:
        """Edit block `index` and write the next block's inputs to `hidden_out`.

        Returns the block's tensors, edited, under the model's parameter names and in the checkpoint's dtype.
        """
        state = self.model.load_block(index)
        if self.edit is None:
            self._only_run(index, hidden_in, hidden_out)
        else:
            edit_block = self._edit_while_running if self.propagate == "sparse" else self._edit_after_running
            stages = self._stages_to_edit(self.model.spec.blocks[index], self.edit)
            with stops_at_stages(self.model.blocks[index], [stage for stage, _ in stages]):
                edit_block(index, self.edit, stages, state, hidden_in, hidden_out)
        self.model.free_block(index)
        hidden_in.release()
        hidden_out.release()
        release_freed_memory()
        return state

    def edit_head(self, tokens_NT: Tensor, hidden: HiddenStates) -> dict[str, Tensor]:
        """Edit the output head, which reads what the last edited block leads to; returns its tensors like a block's."""
        head = self.model.spec.head
        assert head is not None
        assert self.edit is not None
        recorder = Recorder(self.edit.needs_at(head, head.stages[0]) or ())
        for n in range(len(tokens_NT)):
            self._record([recorder], [(self.model.head_inputs(tokens_NT[n : n + 1], hidden[n]), None)], n)
        state = self.model.names.load([linear.parameter for linear in head.linears], self.model.checkpoint.read)
        self._solve(head, head.stages[0], self.edit, [recorder], state)
        return state

    def _only_run(self, index: int, hidden_in: HiddenStates, hidden_out: HiddenStates) -> None:
        for n in range(len(self.real_NT)):
            hidden_out[n] = self.model.run_block(index, hidden_in[n])
            self.advance(1)

    def _stages_to_edit(self, spec: BlockSpec, edit: Edit) -> WantedStages:
        wanted = [(stage, edit.needs_at(spec, stage)) for stage in spec.stages]
        return [(stage, needs) for stage, needs in wanted if needs is not None]

    def _edit_while_running(
        self,
        index: int,
        edit: Edit,
        stages: WantedStages,
        state: dict[str, Tensor],
        hidden_in: HiddenStates,
        hidden_out: HiddenStates,
    ) -> None:
        spec = self.model.spec.blocks[index]
        runs = [StagedRun(self.model, index, hidden_in[n]) for n in range(len(self.real_NT))]
        for stage, needs in stages:
            recorders = [Recorder(needs) for _ in stage.groups]
            for n, run in enumerate(runs):
                self._record(recorders, run.advance(), n)
                if n >= self.num_in_memory:
                    run.spill(keep=runs[0], file=self.spill_files[n])
                self._give_back_while_walking(n, hidden_in)
            hidden_in.release()
            self._solve(spec, stage, edit, recorders, state)
            self._take_over(index, stage, state)
        for n, run in enumerate(runs):
            hidden_out[n] = self._finish(run)
            self._give_back_while_walking(n, hidden_in, hidden_out)
            self.advance(1)

    def _edit_after_running(
        self,
        index: int,
        edit: Edit,
        stages: WantedStages,
        state: dict[str, Tensor],
        hidden_in: HiddenStates,
        hidden_out: HiddenStates,
    ) -> None:
        spec = self.model.spec.blocks[index]
        recorders = [[Recorder(needs) for _ in stage.groups] for stage, needs in stages]
        for n in range(len(self.real_NT)):
            run = StagedRun(self.model, index, hidden_in[n])
            for of_stage in recorders:
                self._record(of_stage, run.advance(), n)
            hidden_out[n] = self._finish(run)
            self._give_back_while_walking(n, hidden_in, hidden_out)
            self.advance(1)
        for (stage, _), of_stage in zip(stages, recorders, strict=True):
            self._solve(spec, stage, edit, of_stage, state)

    def _give_back_while_walking(self, n: int, *hidden: HiddenStates) -> None:
        """After every 16th sequence: freed memory, and the mapped pages of hidden states already walked over.

        Sequences that sleep between two stages leave holes that the next ones do not fit into. On 64 x 1024 tokens of a
        135M model this lowers the peak from 1.53 to 1.18 GiB and costs no measurable time; every 4th took 9% longer.
        """
        if n % 16 == 15:
            release_freed_memory()
            for states in hidden:
                states.release()

    def _finish(self, run: StagedRun) -> Tensor:
        rest = run.advance()
        assert rest is None, "a block passed more stages than its trace showed"
        assert run.output_1TH is not None
        output_1TH, run.output_1TH = run.output_1TH, None
        return output_1TH

    def _record(self, recorders: list[Recorder], inputs: StageInputs | None, n: int) -> None:
        assert inputs is not None, "a block passed fewer stages than its trace showed"
        real_T = self.real_NT[n]
        for recorder, (x_TI, token) in zip(recorders, inputs, strict=True):
            real = real_T.to(x_TI.device) if token is None else real_T.to(x_TI.device)[token]
            recorder.add(x_TI if real.all() else x_TI[real])

    def _solve(
        self, spec: BlockSpec, stage: Stage, edit: Edit, recorders: list[Recorder], state: dict[str, Tensor]
    ) -> None:
        """Edit the stage's matrices in `state`."""
        release_freed_memory()  # a solver's working set is the peak: what the forward pass left behind must go first
        for group, recorder in zip(stage.groups, recorders, strict=True):
            stored = [linear.view(state[spec.full_parameter(linear)]) for linear in group.linears]
            weights = [weight_OI.to(self.model.device) for weight_OI in stored]
            statistics = recorder.statistics()
            self._check_finite(statistics, spec.full_name(group.linears[0]))
            for weight_OI, new_OI in zip(stored, edit(spec, group, weights, statistics, state), strict=True):
                weight_OI.copy_(new_OI)

    def _check_finite(self, statistics: Statistics, name: str) -> None:
        norms_I = statistics.input_sq_norm_I
        if norms_I is not None and not bool(norms_I.isfinite().all()):
            raise UserError(
                f"the inputs of {name} became NaN or Inf in {str(self.model.dtype).removeprefix('torch.')} on the "
                "calibration text, so nothing can be judged by them; try --dtype float32, or repair the checkpoint."
            )

    def _take_over(self, index: int, stage: Stage, state: dict[str, Tensor]) -> None:
        """Let the block that runs have the stage's new weights."""
        spec, block = self.model.spec.blocks[index], self.model.blocks[index]
        for linear in (linear for group in stage.groups for linear in group.linears):
            running_OI = linear.view(block.get_parameter(linear.parameter).data)
            running_OI.copy_(linear.view(state[spec.full_parameter(linear)]))
            if linear.bias:
                block.get_parameter(linear.bias).data.copy_(state[spec.full(linear.bias)])
