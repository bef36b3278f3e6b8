"""Whether a training fits into memory, from shapes alone, and which setting would make it fit.

Per parameter that is trained: 4 bytes of weight, 4 of gradient, 8 of Adam's moments, and a copy in the forward dtype.
Activations are those that backward needs, counted for a gated FFN; the figure is right within about a third.
"""

from dataclasses import dataclass, replace

from prunus.errors import UserError

TRAINED_BYTES = 16
# Values kept for backward per token and block: norms, q, k, v and the attention's output; gate, up and their product
HIDDEN_VALUES, FFN_VALUES = 16, 6
LOGIT_COPIES = 3  # the student's, their gradient, the teacher's


@dataclass(frozen=True, slots=True)
class Sizes:
    """What decides the memory of a training. `processes` share what is trained when the model is sharded."""

    method: str
    parameters: int
    masked: int  # parameters under a keep mask, a byte each
    adapted: int  # parameters of the adapters
    teacher_parameters: int  # of a teacher that stays in memory, else 0
    largest_block: int  # parameters
    num_blocks: int
    hidden: int
    ffn: int
    vocabulary: int
    length: int
    micro_batch: int  # sequences in one forward pass
    forward_bytes: int  # 2 for bf16, 4 for fp32
    checkpointing: bool
    processes: int = 1

    @property
    def tokens_at_once(self) -> int:
        return self.length * self.micro_batch

    @property
    def total_bytes(self) -> int:
        """Estimated peak of one process."""
        if self.method == "block-wise":
            return self._block_wise()
        trained = self.adapted if self.method == "lora" else self.parameters
        weights = trained * TRAINED_BYTES // self.processes + self.masked
        weights += self.parameters * self.forward_bytes  # the forward pass's copy, or the frozen weights
        teacher = self.teacher_parameters * self.forward_bytes
        return weights + teacher + self._activations(self.num_blocks) + self._logits()

    def _block_wise(self) -> int:
        outer = max(self.parameters - self.num_blocks * self.largest_block, 0)
        block = self.largest_block * (TRAINED_BYTES + 2 * self.forward_bytes + 1)
        return block + outer * 4 + self._activations(1) + self._logits()

    def _activations(self, num_blocks: int) -> int:
        one = self.tokens_at_once * (HIDDEN_VALUES * self.hidden + FFN_VALUES * self.ffn) * self.forward_bytes
        if self.checkpointing and num_blocks > 1:
            return one + num_blocks * self.tokens_at_once * self.hidden * self.forward_bytes
        return num_blocks * one

    def _logits(self) -> int:
        return LOGIT_COPIES * self.tokens_at_once * self.vocabulary * self.forward_bytes


def check_fits(sizes: Sizes, available: int) -> None:
    """Raise UserError, before anything is loaded, naming the first setting that would fit."""
    if sizes.total_bytes <= available:
        return
    tries = {
        "--micro-batch 1": replace(sizes, micro_batch=1),
        "--gradient-checkpointing": replace(sizes, checkpointing=True),
        "--micro-batch 1 --gradient-checkpointing": replace(sizes, micro_batch=1, checkpointing=True),
        "--method lora": replace(sizes, method="lora"),
        "--method lora --gradient-checkpointing": replace(sizes, method="lora", checkpointing=True),
        "--method block-wise": replace(sizes, method="block-wise"),
    }
    fits = [words for words, other in tries.items() if other.total_bytes <= available]
    way_out = f"{fits[0]} would fit" if fits else "even block-wise training would not fit: give a shorter --length"
    raise UserError(
        f"not enough memory: --method {sizes.method} takes about {_words(sizes.total_bytes)} and {_words(available)} "
        f"are there; {way_out}."
    )


def _words(size: int) -> str:
    return f"{size / 2**30:.1f} GiB" if size >= 2**30 else f"{size / 2**20:.1f} MiB"
