"""The recursive sparse mixture of experts inside attention (arXiv 2604.25299)."""
