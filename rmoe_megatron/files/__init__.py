"""Files: written whole or not at all, read without trust, their errors in one sentence."""
