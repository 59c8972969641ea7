"""The models: MM-DiT with recursive sparse mixture-of-experts in joint attention, on Megatron-Core."""
