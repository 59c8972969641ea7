"""T2I-CoReBench (arXiv 2509.03516): composition and reasoning, asked question by question of a model that sees and speaks."""
