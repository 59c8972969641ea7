"""Processes and devices: ranks, groups, signals, and Megatron-Core on the CPU."""
