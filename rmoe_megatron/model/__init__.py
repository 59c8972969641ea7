"""The models: MM-DiT and DiT with recursive sparse mixture-of-experts in attention, on Megatron-Core."""
