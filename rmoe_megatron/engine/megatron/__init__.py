"""The engine on Megatron-Core: its schedules, data parallelism and distributed optimizer."""
