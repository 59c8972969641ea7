"""Frozen encoders applied once: raw shards in, shards with latents and text embeddings out."""
