"""The families that are tested, each by a tiny random config. A table for people and tests: no code asks it anything.

Architectures are understood by tracing (see `trace.py`), so a family that is not listed here works as well when its
decoder has the usual shape, and is refused by name when it has not.
"""

from dataclasses import dataclass, field
from typing import Any

_SIZES = {
    "vocab_size": 128,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 16,
    "max_position_embeddings": 64,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}


@dataclass(frozen=True, slots=True)
class Family:
    """One row of `prunus models`: the transformers model type, and what is particular about its blocks."""

    family: str
    name: str
    shape: str
    sizes: dict[str, Any] = field(default_factory=dict)  # on top of, or instead of, the usual ones
    own_names: bool = False  # the config has names of its own: take `sizes` alone

    @property
    def tiny_sizes(self) -> dict[str, Any]:
        """Config arguments of a three-block model that is made in milliseconds."""
        return self.sizes if self.own_names else {**_SIZES, **self.sizes}


FAMILIES = (
    Family("llama", "Llama, SmolLM2", "GQA, gated FFN"),
    Family("mistral", "Mistral", "GQA, sliding window", {"sliding_window": 8}),
    Family("qwen2", "Qwen 2, 2.5", "GQA, biases on q, k, v"),
    Family("qwen3", "Qwen 3", "GQA, norms on q and k, tied embeddings", {"tie_word_embeddings": True}),
    Family(
        "gemma2",
        "Gemma 2",
        "four norms, every other layer windowed, capped logits, tied embeddings",
        {"sliding_window": 8, "query_pre_attn_scalar": 16},
    ),
    Family(
        "gemma3_text",
        "Gemma 3 (text)",
        "norms on q and k, local and global rotary, tied embeddings",
        {
            "sliding_window": 8,
            "query_pre_attn_scalar": 16,
            "layer_types": ["sliding_attention", "sliding_attention", "full_attention"],
        },
    ),
    Family("phi3", "Phi-3, Phi-4", "fused qkv and gate_up"),
    Family("olmo2", "OLMo 2", "norms after the sublayers, norms on q and k"),
    Family(
        "gpt2",
        "GPT-2",
        "Conv1D (weights stored transposed), fused qkv, biases, tied embeddings",
        {
            "vocab_size": 128,
            "n_embd": 64,
            "n_layer": 3,
            "n_head": 4,
            "n_positions": 64,
            "bos_token_id": 1,
            "eos_token_id": 2,
        },
        own_names=True,
    ),
    Family("gpt_neox", "GPT-NeoX, Pythia", "fused qkv, parallel residual, biases"),
    Family("opt", "OPT", "learned positions, biases, ReLU", {"ffn_dim": 96, "word_embed_proj_dim": 64}),
    Family(
        "mixtral", "Mixtral", "experts in fused 3-D tensors, router", {"num_local_experts": 4, "num_experts_per_tok": 2}
    ),
    Family(
        "qwen3_moe",
        "Qwen 3 MoE",
        "experts, some layers dense, norms on q and k",
        {
            "num_experts": 4,
            "num_experts_per_tok": 2,
            "moe_intermediate_size": 32,
            "decoder_sparse_step": 1,
            "mlp_only_layers": [0],
        },
    ),
    Family("olmoe", "OLMoE", "many small experts, norms on q and k", {"num_experts": 4, "num_experts_per_tok": 2}),
)
