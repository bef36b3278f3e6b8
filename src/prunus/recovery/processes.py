"""One process, or several under `accelerate launch`: what the training loop needs to know of the difference.

Alone, nothing of this is touched. Launched with `--use_fsdp`, the model is sharded over the processes, one decoder
block at a time (FSDP2); else every process has a copy (DDP). Every process takes its share of each batch, and process 0
alone writes. The sharding is torch's own call: accelerate's `prepare` shards on GPUs alone, so that what runs there
could not be proved on two processes of a CPU.
"""

import os
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from prunus.errors import UserError
from prunus.models.trace import find_blocks


class Processes:
    """`count` processes of which this is number `index`, computing on `device`."""

    def __init__(self, device: str) -> None:
        self._state: Any = None
        self.count, self.index, self.device = 1, 0, torch.device(device)
        if int(os.environ.get("WORLD_SIZE", "1")) > 1:
            from accelerate import PartialState

            self._state = PartialState(cpu=self.device.type == "cpu")
            self.count, self.index = self._state.num_processes, self._state.process_index
            self.device = self._state.device

    @property
    def is_main(self) -> bool:
        return self.index == 0

    @property
    def sharded(self) -> bool:
        """Whether the launcher was told to shard the model."""
        return self.count > 1 and os.environ.get("ACCELERATE_USE_FSDP", "false").lower() == "true"

    @property
    def kind(self) -> str:
        """How the work is spread, for the record."""
        return "one process" if self.count == 1 else "sharded, FSDP2" if self.sharded else "copies, DDP"

    def spread(self, model: nn.Module, *, uses_head: bool) -> nn.Module:
        """Shard or copy the model. Its parameters are other objects afterwards where it is sharded."""
        if self.count == 1:
            return model
        if not self.sharded:
            return DistributedDataParallel(model, find_unused_parameters=not uses_head)
        from torch.distributed.device_mesh import init_device_mesh
        from torch.distributed.fsdp import fully_shard

        mesh = init_device_mesh(self.device.type, (self.count,))
        for block in find_blocks(model)[1]:
            fully_shard(block, mesh=mesh)
        fully_shard(model, mesh=mesh)
        return model

    def unspread(self, model: nn.Module) -> nn.Module:
        """The model whose parameters have their own names."""
        inner: nn.Module = model.module if isinstance(model, DistributedDataParallel) else model
        return inner

    @contextmanager
    def no_sync(self, model: Any) -> Iterator[None]:
        """Within the context, gradients stay in this process: more micro-batches of the same step follow."""
        if not self.sharded:
            with model.no_sync() if self.count > 1 else nullcontext():
                yield
            return
        model.set_requires_gradient_sync(False)
        yield
        model.set_requires_gradient_sync(True)

    def mean(self, values: dict[str, float]) -> dict[str, float]:
        """The mean over processes of each value."""
        if self.count == 1:
            return values
        sums = torch.tensor(list(values.values()), dtype=torch.float64, device=self.device)
        torch.distributed.all_reduce(sums)
        return dict(zip(values, (sums / self.count).tolist(), strict=True))

    def agree(self, own: Any, choices: tuple[Any, Any]) -> Any:
        """One of two choices for all processes: that of the majority."""
        second = self.mean({"choice": float(own == choices[1])})["choice"]
        return choices[second > 0.5]

    def wait(self) -> None:
        """Go on when every process is here."""
        if self._state is not None:
            self._state.wait_for_everyone()

    def close(self) -> None:
        """Part in good order: a process that just ends makes the others' last messages fail."""
        if self._state is not None:
            self.wait()
            self._state.destroy_process_group()
            self._state._reset_state()

    @contextmanager
    def main_first(self) -> Iterator[None]:
        """Process 0 goes through the body before the others, who find in the cache what it made."""
        if not self.is_main:
            self.wait()
        yield
        if self.is_main:
            self.wait()

    @contextmanager
    def main_only(self, context: Any) -> Iterator[None]:
        """Enter `context` in process 0 alone; the others go on once it is entered."""
        with context if self.is_main else nullcontext():
            self.wait()
            yield


def whole(tensor: Any) -> Tensor:
    """The tensor with all its shards; every process must call this."""
    gathered: Tensor = tensor.full_tensor() if hasattr(tensor, "full_tensor") else tensor
    return gathered.detach()


def shard_like(tensor: Tensor, parameter: Any) -> Tensor:
    """The tensor, spread over processes as the parameter is."""
    if not hasattr(parameter, "to_local"):
        return tensor.to(parameter.device)
    from torch.distributed.tensor import distribute_tensor

    placed: Tensor = distribute_tensor(tensor.to(parameter.device), parameter.device_mesh, parameter.placements)
    return placed


def check_share(count: int, sequences: int, at_once: int, batch_tokens: int, length: int) -> int:
    """Return how many micro-batches of `at_once` sequences each process takes of a step. Raises UserError."""
    if sequences < 1 or sequences % (count * at_once):
        least = count * at_once * length
        raise UserError(
            f"batch_tokens={batch_tokens} is {sequences} sequences of {length} tokens, which {count} process(es) with "
            f"{at_once} at once cannot share evenly: give a multiple of {least}."
        )
    return sequences // (count * at_once)
