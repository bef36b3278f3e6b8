"""A model that transformers has loaded whole, for metrics that are compared with slow loops over its own logits."""

from typing import Any

import torch
from torch import Tensor

from prunus.machine_choice import in_transformers


class InMemory:
    """A `LogitSource` over a loaded transformers model."""

    def __init__(self, model: Any, tokenizer: Any) -> None:
        self.model, self.tokenizer, self.config = model.eval(), tokenizer, model.config
        self.dtype: torch.dtype = model.dtype
        self.conditions = in_transformers(model.dtype)

    @torch.inference_mode()
    def final_hidden(self, tokens_NT: Tensor, progress_text: str) -> Tensor:
        """Return the last hidden states, one window at a time; `progress_text` is not shown."""
        base = self.model.base_model
        return torch.cat(
            [base(tokens_1T, use_cache=False).last_hidden_state for tokens_1T in torch.split(tokens_NT, 1)]
        )

    @torch.inference_mode()
    def logits(self, tokens_1T: Tensor, hidden_1TH: Tensor) -> Tensor:
        """Apply the output head; families that rescale their logits afterwards are not served here."""
        assert getattr(self.config, "final_logit_softcapping", None) is None
        logits_1TV: Tensor = self.model.get_output_embeddings()(hidden_1TH).float()
        return logits_1TV
