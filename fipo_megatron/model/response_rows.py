"""Megatron's GPT model whose head sees only the rows that a loss asks for, or is left to the loss altogether."""

from __future__ import annotations

from typing import Any

import torch
from megatron.core.models.gpt.gpt_model import GPTModel
from megatron.core.tensor_parallel.mappings import gather_from_sequence_parallel_region


class ResponseRowsModel(GPTModel):
    """GPTModel that cuts the hidden states to `rows` before the output layer: prompts and padding make no logits.

    With `returns_hidden_states` there are none at all: the loss is given the cut hidden states, and `head_weight`.
    """

    def __init__(self, *args: Any, returns_hidden_states: bool, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.returns_hidden_states = returns_hidden_states
        self._rows = torch.empty(0, dtype=torch.int64)
        if self.post_process:
            # Rows are chosen among those of the whole sequence, so the gather comes before the output layer, not in it.
            self.output_layer.sequence_parallel = False

    def forward(self, *args: Any, rows: torch.Tensor, **kwargs: Any) -> torch.Tensor:
        """Of `rows` (int64 [R], into this rank's tokens): hidden states [1, R, H], the same on all tensor-parallel
        ranks, which expect the same gradient of them; or logits [1, R, vocabulary / tp].

        On a stage before the last: hidden states of all tokens, as GPTModel.
        """
        self._rows = rows
        return super().forward(*args, **kwargs)

    @property
    def head_weight(self) -> torch.nn.Parameter:
        """This rank's rows of the head, [vocabulary / tp, H]; the embedding's where they are tied. Last stage only."""
        tied = self.share_embeddings_and_output_weights
        return self.shared_embedding_or_output_weight() if tied else self.output_layer.weight

    def _postprocess(self, hidden_states: torch.Tensor, *args: Any, **kwargs: Any) -> torch.Tensor:
        if self.post_process:
            if self.config.sequence_parallel:
                # The head hands each rank the whole gradient of its input: it is cut here, not summed.
                hidden_states = gather_from_sequence_parallel_region(
                    hidden_states, tensor_parallel_output_grad=False, group=self.pg_collection.tp
                )
            hidden_states = hidden_states.index_select(0, self._rows)
            if self.returns_hidden_states:
                return hidden_states.transpose(0, 1)
        return super()._postprocess(hidden_states, *args, **kwargs)
