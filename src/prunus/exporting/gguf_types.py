"""The file types of GGUF that prunus writes: who makes them, which rows they need, and how far they may be off.

The bounds are for the proof of an export: `kl` in nats per token and `nll` in nats, between the engine and transformers
in float32 on the same tokens. They stand about four times above what SmolLM2-135M-Instruct showed (docs/engines.md):
a small model loses more to quantization than a large one, and a wrong conversion is off by whole nats.
"""

from dataclasses import dataclass

from prunus.exporting.types import FileType

BLOCK = 32  # weights of a row that share one scale
K_BLOCK = 256  # and of the K-quants


@dataclass(frozen=True, slots=True, kw_only=True)
class GgufType(FileType):
    """One file type of GGUF. `number` is llama.cpp's own; the length of a quantized row is a multiple of `rows`.

    `converted`: the stock converter writes it itself; the others come from llama.cpp's quantizer. `fallback` is the
    type of the matrices whose rows are not multiples of 256.
    """

    number: int
    rows: int = 1
    converted: bool = False
    fallback: str | None = None

    @property
    def in_two_steps(self) -> bool:
        return not self.converted


def _table(*types: GgufType) -> dict[str, GgufType]:
    return {one.name: one for one in types}


GGUF_TYPES = _table(
    GgufType(name="f32", number=0, bits=32, kl=1e-4, nll=0.002, converted=True),
    GgufType(name="f16", number=1, bits=16, kl=1e-4, nll=0.002, converted=True),
    GgufType(name="bf16", number=32, bits=16, kl=1e-3, nll=0.005, converted=True),
    GgufType(name="q8_0", number=7, bits=8.5, kl=0.025, nll=0.03, rows=BLOCK, converted=True),
    GgufType(name="q6_k", number=18, bits=6.56, kl=0.08, nll=0.08, rows=K_BLOCK, fallback="q8_0"),
    GgufType(name="q5_k_m", number=17, bits=5.5, kl=0.4, nll=0.4, rows=K_BLOCK, fallback="q5_1"),
    GgufType(name="q5_0", number=8, bits=5.5, kl=0.4, nll=0.4, rows=BLOCK),
    GgufType(name="q4_k_m", number=15, bits=4.5, kl=0.4, nll=0.4, rows=K_BLOCK, fallback="q5_0"),
    GgufType(name="q4_k_s", number=14, bits=4.5, kl=0.4, nll=0.4, rows=K_BLOCK, fallback="q5_0"),
    GgufType(name="q4_0", number=2, bits=4.5, kl=2.0, nll=0.8, rows=BLOCK),
    GgufType(name="q3_k_m", number=12, bits=3.44, kl=2.0, nll=0.8, rows=K_BLOCK, fallback="q4_0"),
    GgufType(name="q2_k", number=10, bits=2.63, kl=2.5, nll=1.2, rows=K_BLOCK, fallback="q4_0"),
)
DEFAULT = "f16"
