"""Results of evaluations side by side, with published ones and the error of every difference."""
