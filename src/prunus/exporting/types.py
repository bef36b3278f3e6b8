"""What every file type of every format states: its size, and how far it may be off in the proof of an export."""

from dataclasses import dataclass


@dataclass(frozen=True, slots=True, kw_only=True)
class FileType:
    """`bits` per weight of most matrices, scales included. The bounds hold between the engine and transformers in
    float32 on the same tokens: `kl` in nats per token, `nll` in nats. `keeps`: the weights stay as `prunus quantize`
    of the scheme with this name wrote them.
    """

    name: str
    bits: float
    kl: float
    nll: float
    keeps: bool = False

    @property
    def in_two_steps(self) -> bool:
        """Whether a file as large as the checkpoint is written first, and this one made from it."""
        return False
