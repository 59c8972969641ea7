"""Plain low-rank adaptation: the baseline that the recurrence is compared with."""
