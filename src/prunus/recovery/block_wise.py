"""Block-wise reconstruction: each decoder block learns to give what the teacher's gives.

    minimise  ||block(x) - t||^2 / ||t||^2      x what the recovered blocks before it lead to, t the teacher's states

There is no backward pass through the whole model: memory is one block with its gradients and Adam's moments, whatever
the model's size. The distance is SquareHead's (losses.py). Hidden states of all windows wait in the two memory-mapped
files that the block pass uses too, read and written in turn; a killed run goes on from the last finished block.

After depth pruning t is what the teacher has behind the run that was removed after the block (steps/recover_layers.py):
there is no later block to make up for the run, and the next one's input is then what it was in the teacher.

A block keeps what it learned only where its distance on held-out windows fell.

Shapes: N = windows, T = tokens, H = hidden width.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from prunus.calibration.hidden_states import HiddenStates
from prunus.errors import UserError
from prunus.memory import release_freed_memory
from prunus.models import StreamedModel
from prunus.progress import Advance
from prunus.recovery.data import TrainingText, order
from prunus.recovery.keep_masks import KeepMasks
from prunus.recovery.losses import forward_kl, square_head
from prunus.recovery.trainer import Plan, make_optimizer


@dataclass(frozen=True, slots=True)
class Rows:
    """Which rows of the hidden states belong to whom: N windows to train on, then M held out."""

    train: int
    held_out: int

    @property
    def student(self) -> range:
        return range(self.train + self.held_out)

    @property
    def student_held_out(self) -> range:
        return range(self.train, self.train + self.held_out)

    @property
    def untrained(self) -> range:
        """The held-out windows on their way through the blocks as they were."""
        return range(self.train + self.held_out, self.train + 2 * self.held_out)

    @property
    def total(self) -> int:
        """Rows of one model's hidden states."""
        return self.train + 2 * self.held_out

    def teacher(self, row: int) -> int:
        """Where the teacher's states of the same window are."""
        own = row - self.held_out if row in self.untrained else row
        return self.total + own

    @property
    def all(self) -> int:
        return self.total + len(self.student)


class BlockWise:
    """Trains one block after the other. `plan.layers`: how many of the teacher's blocks each one learns the end of."""

    def __init__(
        self, student: StreamedModel, teacher: StreamedModel, text: TrainingText, plan: Plan, weight_decay: float
    ) -> None:
        self.student, self.teacher, self.plan, self.weight_decay = student, teacher, plan, weight_decay
        self.tokens_NT = torch.cat([text.train_NT, text.held_out_NT])
        self.rows = Rows(len(text.train_NT), len(text.held_out_NT))

    @property
    def shape(self) -> tuple[int, int, int]:
        """Of the hidden states that wait between two blocks."""
        hidden = int(self.student.config.get_text_config(decoder=True).hidden_size)
        return (self.rows.all, self.tokens_NT.shape[1], hidden)

    def embed(self, hidden: HiddenStates) -> None:
        """Fill the inputs of the first block."""
        for row in self.rows.student:
            hidden[row] = self.student.embed(self.tokens_NT[row : row + 1])
            hidden[self.rows.teacher(row)] = self.teacher.embed(self.tokens_NT[row : row + 1])
        for row, same in zip(self.rows.untrained, self.rows.student_held_out, strict=True):
            hidden[row] = hidden[same]

    def learn_calls(self) -> None:
        """How blocks are called, for a run that goes on behind the embedding; then the embeddings may go."""
        for model in (self.student, self.teacher):
            model.embed(self.tokens_NT[:1])
            model.free_outer()

    def run_block(
        self,
        index: int,
        hidden_in: HiddenStates,
        hidden_out: HiddenStates,
        find_masks: Callable[[dict[str, Tensor]], KeepMasks],
        advance: Advance,
    ) -> tuple[dict[str, Tensor], dict[str, Any]]:
        """Train block `index` and write the next one's inputs; returns its tensors and what became of it."""
        self._run_teacher(index, hidden_in, hidden_out)
        state = self.student.load_block(index)
        masks, block = find_masks(state), self.student.blocks[index]
        parameters = {f"{self.student.spec.blocks[index].name}.{n}": p for n, p in block.named_parameters()}
        for parameter in parameters.values():
            parameter.data = parameter.data.clone()  # the stored tensors, which it may share, are the way back
        with torch.no_grad():
            before = self._distance(index, hidden_in, hidden_out)
            for row in self.rows.untrained:
                hidden_out[row] = self._forward(index, hidden_in[row])
        self._train(index, parameters, masks, hidden_in, hidden_out, advance)
        with torch.no_grad():
            after = self._distance(index, hidden_in, hidden_out)
            if not after < before:
                for name, parameter in parameters.items():
                    parameter.copy_(state[name])
            for row in self.rows.student:
                hidden_out[row] = self._forward(index, hidden_in[row])
        trained = {n: p.detach().to(state[n].dtype, copy=True).cpu() for n, p in parameters.items() if n in state}
        self.student.free_block(index)
        hidden_in.release()
        hidden_out.release()
        release_freed_memory()
        return {**state, **trained}, {"block": index, "before": before, "after": after, "kept": after < before}

    def _run_teacher(self, index: int, hidden_in: HiddenStates, hidden_out: HiddenStates) -> None:
        """The teacher's states behind the block that this one learns from: several on, after depth pruning."""
        first = self.plan.layers[index - 1] if index else 0
        source = hidden_in
        for number in range(first, self.plan.layers[index]):
            self.teacher.load_block(number)
            with torch.no_grad(), self._autocast():
                for row in map(self.rows.teacher, self.rows.student):
                    hidden_out[row] = self.teacher.run_block(number, source[row])
            self.teacher.free_block(number)
            source = hidden_out

    def _train(
        self,
        index: int,
        parameters: dict[str, nn.Parameter],
        masks: KeepMasks,
        hidden_in: HiddenStates,
        hidden_out: HiddenStates,
        advance: Advance,
    ) -> None:
        block, plan = self.student.blocks[index].requires_grad_(True), self.plan
        optimizer = make_optimizer(block, plan.lr, self.weight_decay)
        for step in range(plan.steps):
            rows = order(self.rows.train, step * plan.sequences, plan.sequences, plan.seed)
            losses = [self._backward(index, row, hidden_in, hidden_out) for row in rows]
            masks.clear_gradients(parameters)
            norm = float(nn.utils.clip_grad_norm_(list(parameters.values()), plan.clip))
            mean = sum(losses) / len(losses)
            self._check_finite(index, step, mean + norm)
            for group in optimizer.param_groups:
                group["lr"] = plan.lr_at(step)
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
            masks.clear_weights(parameters)
            advance(1, f"block {index}, distance {mean:.4f}")
        block.requires_grad_(False)

    def _backward(self, index: int, row: int, hidden_in: HiddenStates, hidden_out: HiddenStates) -> float:
        output_1TH = self._forward(index, hidden_in[row])
        loss = square_head([output_1TH], [hidden_out[self.rows.teacher(row)].to(output_1TH.device)])
        (loss / self.plan.sequences).backward()  # type: ignore[no-untyped-call]
        return float(loss.detach())

    def _check_finite(self, index: int, step: int, value: float) -> None:
        if not torch.tensor(value).isfinite():
            raise UserError(
                f"the distance became {value} at step {step + 1} of block {index} (lr {self.plan.lr_at(step):.2g}); "
                f"training stopped, and the blocks before it are kept beside OUT; remove that directory and run again "
                f"with a lower --lr than {self.plan.lr:g}."
            )

    def _distance(self, index: int, hidden_in: HiddenStates, hidden_out: HiddenStates) -> float:
        """Mean distance on the held-out windows."""
        found = [
            square_head([self._forward(index, hidden_in[row])], [hidden_out[self.rows.teacher(row)].to(self._device)])
            for row in self.rows.student_held_out
        ]
        return float(torch.stack(found).mean())

    def _forward(self, index: int, hidden_1TH: Tensor) -> Tensor:
        with self._autocast():
            return self.student.run_block(index, hidden_1TH.clone())

    def _autocast(self) -> torch.autocast:
        return torch.autocast(self._device.type, self.plan.dtype, enabled=self.plan.dtype != torch.float32)

    @property
    def _device(self) -> torch.device:
        return self.student.device

    def held_out(self, hidden: HiddenStates) -> tuple[dict[str, float], dict[str, float]]:
        """Held-out losses of the model as it was and as it is, from the last block's output."""
        was: list[tuple[float, float]] = []
        now: list[tuple[float, float]] = []
        for number, row in enumerate(self.rows.student_held_out):
            tokens_1T = self.tokens_NT[row : row + 1]
            teacher_tV = self.teacher.logits(tokens_1T, hidden[self.rows.teacher(row)])[0, :-1]
            for own, found in ((self.rows.untrained[number], was), (row, now)):
                student_tV = self.student.logits(tokens_1T, hidden[own])[0, :-1]
                nll = nn.functional.cross_entropy(student_tV, tokens_1T[0, 1:].to(student_tV.device))
                found.append((float(nll), float(forward_kl(teacher_tV, student_tV).mean())))
        return _mean(was), _mean(now)


def _mean(found: list[tuple[float, float]]) -> dict[str, float]:
    nll, kl = (sum(column) / len(column) for column in zip(*found, strict=True))
    return {"nll": nll, "kl": kl}
