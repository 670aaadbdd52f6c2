"""What the tools import on their way to the workers, for the process from which the tests fork them."""

import matplotlib.pyplot  # noqa: F401
from transformers import AutoModelForCausalLM, AutoTokenizer, Qwen2Config, Qwen2Tokenizer  # noqa: F401

import fipo_megatron.trainer.launch  # noqa: F401
