"""What the tools and the ranks import, for the process from which the tests fork them.

Megatron-Core, too: three seconds a rank. In a run's own processes it is imported after the patches of
model/platform.py, which real runs in tests/smoke/ show to work; here before them, which the ranks' tests show.
"""

import matplotlib.pyplot  # noqa: F401
from transformers import AutoModelForCausalLM, AutoTokenizer, Qwen2Config, Qwen2Tokenizer  # noqa: F401

import fipo_megatron.model.weights
import fipo_megatron.trainer.launch  # noqa: F401
