"""From a configuration to batches: the data of each stage, the order of its samples, and the frozen encoders."""
