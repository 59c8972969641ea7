"""Tar shards: archives, their index, decoding, reading and writing."""
