"""What a recovery leaves: trained weights under the checkpoint's names and dtypes, and the zeros counted in them."""

from collections.abc import Callable
from typing import Any

from torch import Tensor

from prunus.checkpoint import OutputDirectory
from prunus.progress import say
from prunus.recovery.keep_masks import Matrix, count_zeros
from prunus.steps.recover_setup import Setup

# The trained weight of a parameter, by the model's own name; None for one that was not trained
Trained = Callable[[str], Tensor | None]


class Result:
    """Writes the weight files; counts `zeros` of each masked and trained matrix, and `all_zeros` of all tensors."""

    def __init__(self, setup: Setup, output: OutputDirectory, pruned: list[Matrix]) -> None:
        self.setup, self.output, self.pruned = setup, output, pruned
        self.zeros: dict[str, int] = {}
        self.all_zeros = 0

    def write_all(self, trained: Trained) -> None:
        """Write every weight file: what was trained, cast to the dtype it is stored in, and the rest as it was."""
        model, shards = self.setup.model, self.setup.shards
        outer = self._stored(model.outer_parameters(), trained)
        for name, keys in shards.outer.items():
            self._write(name, keys, outer)
        for index, keys in enumerate(model.block_keys()):
            self._write(shards.of_block(index), keys, self._stored(model.block_parameters(index), trained))

    def _stored(self, names: list[str], trained: Trained) -> dict[str, Tensor]:
        """The trained tensors behind these parameters, under the checkpoint's names, in its dtype."""
        model, tensors = self.setup.model, self.setup.checkpoint.tensors
        found = {}
        for name in names:
            keys = model.names.keys_of([name])
            weight = trained(name) if keys else None
            if weight is not None:
                found[name] = weight.to(tensors[keys[0]].dtype, copy=True)  # tied ones have one memory, files two
        self.zeros |= count_zeros([matrix for matrix in self.pruned if matrix.parameter in found], found)
        return model.names.store(found)

    def _write(self, file: str, keys: list[str], changed: dict[str, Tensor]) -> None:
        tensors = {key: changed[key] if key in changed else self.setup.checkpoint.read(key) for key in keys}
        self.all_zeros += sum(int((tensor == 0).sum()) for tensor in tensors.values())
        self.output.write_shard(file, tensors)


def zeros_facts(
    before: dict[str, int], after: dict[str, int], all_zeros: int, pruned_weights: int, num_parameters: int
) -> dict[str, Any]:
    """For the record: zeros of each masked matrix before and after, of which there are never fewer, and over all."""
    assert all(after[name] >= before[name] for name in before), "a zero came back"
    rows: list[dict[str, Any]] = [
        {"name": name, "before": count, "after": after[name]} for name, count in before.items()
    ]
    zeros = sum(after[name] for name in before)
    share = {"pruned_matrices": zeros / max(pruned_weights, 1), "all_parameters": all_zeros / max(num_parameters, 1)}
    return {"sparsity": share, "zeros": rows}


def say_guessed_masks(setup: Setup, pruned: list[Matrix]) -> None:
    """Tell whose zeros are kept where no record says that they were pruned."""
    recorded = {row["name"] for step in setup.history for row in step.get("matrices") or ()}
    guessed = [matrix.name for matrix in pruned if matrix.name not in recorded]
    if guessed and setup.settings.keep_zeros == "auto" and setup.processes.is_main:
        say(
            [
                f"{len(guessed)} matrices, {guessed[0]} the first of them, are in no record but have many zeros, "
                "which are kept; --keep-zeros none trains them too."
            ]
        )
