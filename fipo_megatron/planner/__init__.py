"""What a run will take, before it is queued: memory, time, communication. Pure: no processes, no Megatron."""
