"""Where shards lie: on a disk or in a store, read in blocks."""
