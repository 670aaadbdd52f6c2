"""FIPO on Megatron-Core: reinforcement learning of long reasoning with future-KL influence weights."""

__version__ = "0.1.0"
