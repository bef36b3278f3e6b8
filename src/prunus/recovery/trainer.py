"""The training loop: micro-batches, masked gradients, AdamW, held-out evaluations, early stop, exact resume.

Every decision of a step depends on its number alone (which windows, which learning rate), and what a step leaves
behind (weights, Adam's moments) is kept in fp32 as it is: a run that was killed ends in the same curve, bit for bit on
the same machine. Weights are fp32; forward and backward run in bf16 under autocast where that was chosen.

Shapes: B = sequences, T = tokens, N = windows.
"""

import math
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from prunus.benchmark.machine import peak_resident_bytes
from prunus.errors import UserError
from prunus.progress import Advance
from prunus.recovery.data import TrainingText, order
from prunus.recovery.keep_masks import KeepMasks
from prunus.recovery.losses import mean_losses, square_head, token_losses
from prunus.recovery.processes import Processes, shard_like, whole
from prunus.recovery.progress_files import Metrics, Progress, ProgressFiles, Tensors
from prunus.recovery.teacher import HELD_OUT, TRAIN, Answer, Teacher, predicting

MOMENTS = ("exp_avg", "exp_avg_sq")
CURVE_POINTS = 200
BETAS = (0.9, 0.95)  # the second one forgets sooner than the usual 0.999, which a run of some hundred steps never fills


@dataclass(frozen=True, slots=True)
class Plan:
    """What a training does, step by step; all of it follows from the settings and the text."""

    steps: int
    sequences: int  # in a step, over all processes
    micro_batches: int  # of each process in a step
    evaluate_every: int
    patience: int
    lr: float
    warm_up: int
    clip: float
    seed: int
    losses: dict[str, float]
    temperature: float
    layers: tuple[int, ...]  # for "hidden": of each block, how many of the teacher's blocks it stands at the end of
    dtype: torch.dtype

    def lr_at(self, step: int) -> float:
        """Linear warm-up, then a cosine to zero at the end of the budget."""
        if step < self.warm_up:
            return self.lr * (step + 1) / self.warm_up
        return self.lr * 0.5 * (1 + math.cos(math.pi * (step - self.warm_up) / max(self.steps - self.warm_up, 1)))


def make_optimizer(model: nn.Module, lr: float, weight_decay: float) -> torch.optim.AdamW:
    """AdamW over what is trained; only matrices decay."""
    trained = [p for p in model.parameters() if p.requires_grad]
    groups = [
        {"params": [p for p in trained if p.ndim > 1], "weight_decay": weight_decay},
        {"params": [p for p in trained if p.ndim <= 1], "weight_decay": 0.0},
    ]
    return torch.optim.AdamW([g for g in groups if g["params"]], lr=lr, betas=BETAS, fused=True)


def held_out_goal(found: dict[str, float], losses: dict[str, float]) -> float:
    """What decides which evaluation is the best: the losses that are trained, weighed as they are.

    KL alone would call text that the teacher does not predict a loss, and hand back the weights of the start. Hidden
    states are judged by the predictions they lead to.
    """
    of_losses = {"ce": "nll", "logits": "kl"}
    trained = [weight * found[of_losses[name]] for name, weight in losses.items() if name in of_losses]
    return sum(trained) if trained else found.get("kl", found["nll"])


def thinned(rows: list[dict[str, float]]) -> list[dict[str, float]]:
    """About CURVE_POINTS rows at most, evenly spread, the last one among them."""
    every = max(len(rows) // CURVE_POINTS, 1)
    return [row for number, row in enumerate(rows, start=1) if number % every == 0 or number == len(rows)]


class Trainer:
    """Trains `student` in place; afterwards the best weights lie in `files`, under `progress.best_step`."""

    def __init__(
        self,
        student: nn.Module,
        teacher: Teacher | None,
        masks: KeepMasks,
        text: TrainingText,
        plan: Plan,
        *,
        weight_decay: float,
        processes: Processes,
    ) -> None:
        self.teacher, self.text, self.plan, self.processes = teacher, text, plan, processes
        self._within = False  # a part that is timed
        self.model = processes.spread(student, uses_head=set(plan.losses) != {"hidden"})
        inner = processes.unspread(self.model)
        self.optimizer = make_optimizer(inner, plan.lr, weight_decay)
        self.trained = {name: p for name, p in inner.named_parameters() if p.requires_grad}
        masks = KeepMasks({name: keep for name, keep in masks.keep.items() if name in self.trained})
        self.masks = masks.placed_like(self.trained)

    def train(self, progress: Progress, files: ProgressFiles, metrics: Metrics, advance: Advance) -> Progress:
        """Go on from `progress` to the end of the budget or to the early stop."""
        self.progress, self.files, self.metrics = progress, files, metrics
        self._begun = time.monotonic()
        if progress.evaluations:
            self._restore(progress.step)
        else:
            self._evaluate_and_save()
        while progress.step < self.plan.steps and progress.stopped is None:
            loss = self._step(progress.step)
            advance(1, f"loss {loss:.4f}, {self._tokens_per_second():.0f} tokens/s, held-out {progress.best:.4f}")
            if progress.step % self.plan.evaluate_every == 0 or progress.step == self.plan.steps:
                self._evaluate_and_save()
        return progress

    def _step(self, step: int) -> float:
        """One optimizer step; returns its loss."""
        started = time.monotonic()
        losses = [self._micro_batch(windows, last) for windows, last in self._micro_batches(step)]
        with self._timed("optimizer"):
            self.masks.clear_gradients(self.trained)
            norm = float(whole(nn.utils.clip_grad_norm_(list(self.trained.values()), self.plan.clip)))
            means = self.processes.mean({name: sum(row[name] for row in losses) / len(losses) for name in losses[0]})
            self._check_finite(step, {**means, "gradient norm": norm})
            for group in self.optimizer.param_groups:
                group["lr"] = self.plan.lr_at(step)
            self.optimizer.step()
            self.optimizer.zero_grad(set_to_none=True)
            self.masks.clear_weights(self.trained)
        self.progress.step += 1
        self.progress.train_seconds += time.monotonic() - started
        self._note(means, norm)
        return means["loss"]

    def _micro_batches(self, step: int) -> Iterator[tuple[list[int], bool]]:
        """The windows of each micro-batch of this process, and whether it is the last one of the step."""
        plan, count = self.plan, self.processes.count
        chosen = order(len(self.text.train_NT), step * plan.sequences, plan.sequences, plan.seed)
        own = chosen[self.processes.index :: count]
        size = len(own) // plan.micro_batches
        for number in range(plan.micro_batches):
            yield own[number * size : (number + 1) * size], number == plan.micro_batches - 1

    def _micro_batch(self, windows: list[int], last: bool) -> dict[str, float]:
        """Forward and backward of some windows; returns their losses."""
        with nullcontext() if last else self.processes.no_sync(self.model):
            total, means = self._losses(TRAIN, windows, self.plan.losses, self.plan.temperature)
            with self._timed("backward"):
                (total / self.plan.micro_batches).backward()  # type: ignore[no-untyped-call]
        return {"loss": float(total.detach()), **means}

    def _losses(
        self, part: str, windows: Sequence[int], weights: dict[str, float], temperature: float
    ) -> tuple[Tensor, dict[str, float]]:
        tokens_NT = {TRAIN: self.text.train_NT, HELD_OUT: self.text.held_out_NT}[part]
        tokens_BT, hidden = tokens_NT[list(windows)].to(self.processes.device), "hidden" in weights
        with torch.autocast(tokens_BT.device.type, self.plan.dtype, enabled=self.plan.dtype != torch.float32):
            answer = None
            if self.teacher is not None and set(weights) != {"ce"}:
                with self._timed("teacher"):
                    answer = self.teacher.answer(tokens_BT, part, windows, hidden=hidden)
            with self._timed("forward"):
                output = self.model(input_ids=tokens_BT, use_cache=False, output_hidden_states=hidden)
        with self._timed("loss"):
            return self._weigh(output, answer, tokens_BT, weights, temperature)

    def _weigh(
        self, output: Any, answer: Answer | None, tokens_BT: Tensor, weights: dict[str, float], temperature: float
    ) -> tuple[Tensor, dict[str, float]]:
        names = [name for name in weights if name != "hidden"]
        total, means = torch.zeros((), device=tokens_BT.device), dict[str, float]()
        if names:
            targets_t = tokens_BT[:, 1:].flatten()
            losses_of = token_losses(names, targets_t, answer.logits if answer else None, temperature)
            total, means = mean_losses(predicting(output.logits), losses_of, weights)
        if "hidden" in weights:
            assert answer is not None
            distance = square_head(output.hidden_states[1:], [answer.hidden[layer] for layer in self.plan.layers])
            total, means = total + weights["hidden"] * distance, {**means, "hidden": float(distance.detach())}
        return total, means

    def _check_finite(self, step: int, values: dict[str, float]) -> None:
        wrong = [name for name, value in values.items() if not math.isfinite(value)]
        if wrong:
            raise UserError(
                f"{wrong[0]} became {values[wrong[0]]} at step {step + 1} (lr {self.plan.lr_at(step):.2g}); training "
                f"stopped. The state of step {self.progress.evaluations[-1]['step']} is kept in {self.files.folder}; "
                f"remove it and run again with a lower --lr than {self.plan.lr:g}."
            )

    def _note(self, means: dict[str, float], norm: float) -> None:
        step = self.progress.step
        tokens = step * self.plan.sequences * self.text.train_NT.shape[1]
        row = {"step": step, "tokens": tokens, **means, "lr": self.plan.lr_at(step - 1), "gradient_norm": norm}
        self.metrics.write({**row, "tokens_per_second": round(self._tokens_per_second(), 1)})
        self.progress.curve.append(row)

    def _tokens_per_second(self) -> float:
        tokens = self.progress.step * self.plan.sequences * self.text.train_NT.shape[1]
        return tokens / max(self.progress.train_seconds, 1e-9)

    # --- held-out text, saving, going on ---

    @torch.no_grad()
    def _held_out(self) -> dict[str, float]:
        """Mean losses on the held-out windows, each process taking every count-th; all make as many forward passes."""
        weights, num = {"ce": 1.0, **({"logits": 1.0} if self.teacher else {})}, len(self.text.held_out_NT)
        sums, count, index = dict.fromkeys(weights, 0.0), self.processes.count, self.processes.index
        for start in range(0, num, count):
            window = min(start + index, num - 1)
            _, means = self._losses(HELD_OUT, [window], weights, temperature=1.0)
            if start + index < num:
                sums = {name: sums[name] + mean for name, mean in means.items()}
        means = self.processes.mean({name: value * count / num for name, value in sums.items()})
        return {"nll": means["ce"], **({"kl": means["logits"]} if self.teacher else {})}

    def _evaluate_and_save(self) -> None:
        progress = self.progress
        with self._timed("held-out"):
            found = self._held_out()
        self._check_held_out(found)
        goal = held_out_goal(found, self.plan.losses)
        progress.evaluations.append({"step": progress.step, **found})
        self.metrics.write({"step": progress.step, "held_out": found})
        if progress.best is None or goal < progress.best:
            progress.best, progress.best_step, progress.worse = goal, progress.step, 0
        else:
            progress.worse += 1
        if self.plan.patience and progress.worse >= self.plan.patience and progress.step < self.plan.steps:
            progress.stopped = f"held-out loss did not fall in {progress.worse} evaluations"
        self._save()

    def _check_held_out(self, found: dict[str, float]) -> None:
        if self.progress.evaluations:
            self._check_finite(self.progress.step - 1, {f"held-out {name}": value for name, value in found.items()})
        elif not all(map(math.isfinite, found.values())):
            raise UserError(
                "the model's losses on the held-out text are not finite before training; evaluate it first."
            )

    def _save(self) -> None:
        now = time.monotonic()
        self.progress.seconds += now - self._begun
        self._begun = now
        peak = peak_resident_bytes() or 0
        self.progress.peak_memory_bytes = max(self.progress.peak_memory_bytes, peak)
        state = self.optimizer.state
        moments = {
            f"{moment}.{name}": whole(state[p][moment])
            for name, p in self.trained.items()
            if p in state
            for moment in MOMENTS
        }
        self.files.save(self.progress, {name: whole(p) for name, p in self.trained.items()}, moments)
        self.processes.wait()

    @torch.no_grad()
    def _restore(self, step: int) -> None:
        weights, moments = self.files.weights(step), self.files.moments(step)
        for name, parameter in self.trained.items():
            parameter.copy_(shard_like(weights[name], parameter))
            if f"{MOMENTS[0]}.{name}" in moments:  # a head that no loss reads has none
                own: Tensors = {m: shard_like(moments[f"{m}.{name}"], parameter) for m in MOMENTS}
                self.optimizer.state[parameter] = {"step": torch.tensor(float(step)), **own}

    @contextmanager
    def _timed(self, part: str) -> Iterator[None]:
        """Add the seconds of the body to a part, not to one within it; a GPU is waited for."""
        outermost, self._within = not self._within, True
        started = time.perf_counter()
        yield
        if not outermost:
            return
        if self.processes.device.type == "cuda":
            torch.cuda.synchronize(self.processes.device)
        self._within = False
        parts = self.progress.parts
        parts[part] = parts.get(part, 0.0) + time.perf_counter() - started
