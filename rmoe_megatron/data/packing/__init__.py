"""Shards from folders and tables of the user's own."""
