"""Frozen encoders: text to token states and a pooled vector, images to latents."""
