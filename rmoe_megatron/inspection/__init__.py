"""What a run, a draw, a node or a precision holds."""
