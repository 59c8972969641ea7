"""GenEval 2 (arXiv 2512.16853): every atom of a prompt is asked of a model that sees and speaks (Soft-TIFA)."""
