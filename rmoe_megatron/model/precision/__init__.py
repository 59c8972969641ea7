"""Linear layers by backend and precision."""
