"""Data: WebDataset shards, their deterministic order, and the toy shapes set."""
