"""DPG-Bench (arXiv 2403.05135): long prompts, cut into propositions that depend on each other."""
