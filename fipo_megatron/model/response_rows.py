"""Megatron's GPT model whose head sees only the rows that a loss asks for."""

from __future__ import annotations

from typing import Any

import torch
from megatron.core.models.gpt.gpt_model import GPTModel
from megatron.core.tensor_parallel.mappings import gather_from_sequence_parallel_region


class ResponseRowsModel(GPTModel):
    """GPTModel that cuts the hidden states to `rows` before the output layer: prompts and padding make no logits."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self._rows = torch.empty(0, dtype=torch.int64)
        if self.post_process:
            # Rows are chosen among those of the whole sequence, so the gather comes before the output layer, not in it.
            self.output_layer.sequence_parallel = False

    def forward(self, *args: Any, rows: torch.Tensor, **kwargs: Any) -> torch.Tensor:
        """Logits [1, R, vocabulary / tp] of `rows` (int64 [R], into this rank's tokens).

        On a stage before the last: hidden states, as GPTModel.
        """
        self._rows = rows
        return super().forward(*args, **kwargs)

    def _postprocess(self, hidden_states: torch.Tensor, *args: Any, **kwargs: Any) -> torch.Tensor:
        if self.post_process:
            if self.config.sequence_parallel:
                # The output layer hands each rank the whole gradient of its input: it is cut here, not summed.
                hidden_states = gather_from_sequence_parallel_region(
                    hidden_states, tensor_parallel_output_grad=False, group=self.pg_collection.tp
                )
            hidden_states = hidden_states.index_select(0, self._rows)
        return super()._postprocess(hidden_states, *args, **kwargs)
