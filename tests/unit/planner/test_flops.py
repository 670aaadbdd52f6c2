"""Operations against hand-counted ones, and against a count of torch's."""

import numpy as np
import torch
from torch.utils.flop_counter import FlopCounterMode

from fipo_megatron.model.hf_config import ModelShape
from fipo_megatron.planner.flops import elementwise_accesses, forward_flops, num_pairs, training_flops


def make_shape(**changes) -> ModelShape:
    sizes = {
        "architecture": "Qwen3ForCausalLM",
        "vocab_size": 11,
        "hidden_size": 8,
        "intermediate_size": 12,
        "num_layers": 3,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "head_dim": 5,
        "max_positions": 64,
        "rms_norm_eps": 1e-6,
        "rope_theta": 1e4,
        "tie_word_embeddings": False,
        "qkv_bias": False,
        "qk_norm": True,
    }
    return ModelShape(**(sizes | changes))


def test_pairs_are_those_of_a_causal_mask():
    assert num_pairs(np.array([1, 4])) == 1 + 10


def test_a_pass_by_hand():
    # A layer's weights: q 8x20, k and v 8x10 each, o 20x8 = 480; MLP 3 x 8 x 12 = 288. 3 layers, 5 tokens.
    layers = 2 * 3 * (480 + 288) * 5
    attention = 2 * 2 * 3 * 20 * (3 + 6)  # scores and context: pairs of sequences of 2 and 3 tokens
    head = 2 * 8 * 11 * 2
    assert forward_flops(make_shape(), np.array([2, 3]), 2) == layers + attention + head
    assert training_flops(make_shape(), np.array([2, 3]), 2) == 3 * (layers + attention + head)


def test_experts_count_those_that_a_token_is_sent_to_and_the_router():
    shape = make_shape(num_experts=16, experts_per_token=2, moe_intermediate_size=6, norm_topk_prob=True)
    weights = 480 + 3 * 8 * (2 * 6) + 8 * 16
    assert forward_flops(shape, np.array([1]), 0) == 2 * 3 * weights + 4 * 3 * 20


def test_elements_that_pass_through_memory() -> None:
    # Hidden 8: norms 2 x (8 + 8), sums 2 x (16 + 8). Queries and keys of 6 heads of 5, in and out; 3 x 12.
    assert elementwise_accesses(make_shape()) == (32 + 48, 60 + 36)
    experts = make_shape(num_experts=16, experts_per_token=2, moe_intermediate_size=6, norm_topk_prob=True)
    # One token becomes two copies, read and written, and two become one again.
    assert elementwise_accesses(experts) == (80 + (8 + 16) + (16 + 8), 60 + 2 * 18)


def test_against_torchs_count_of_a_transformers_model():
    """torch counts the whole square of scores, and every row of the head."""
    from transformers import Qwen2Config, Qwen2ForCausalLM

    sizes = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "vocab_size": 64}
    model = Qwen2ForCausalLM(
        Qwen2Config(**sizes, num_attention_heads=4, num_key_value_heads=2, attn_implementation="eager")
    )
    tokens = torch.zeros(1, 10, dtype=torch.long)
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        model(tokens, use_cache=False)
    shape = make_shape(
        hidden_size=32, intermediate_size=48, num_layers=2, vocab_size=64, head_dim=8, qkv_bias=True, qk_norm=False
    )
    square = 4 * 2 * 32 * (10 * 10 - 55)  # what a causal kernel leaves out
    rotary = counter.get_total_flops() - (forward_flops(shape, np.array([10]), 10) + square)
    assert 0 <= rotary <= 0.001 * counter.get_total_flops()  # the angles: one product of 4 frequencies and 10 positions
