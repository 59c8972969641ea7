"""What a run needs before it has a GPU: memory, traffic and time of a layout, from the real code on tensors without values."""
