"""Recursive sparse mixture-of-experts for text-to-image diffusion transformers on Megatron-Core."""
