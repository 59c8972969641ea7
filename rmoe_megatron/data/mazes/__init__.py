"""Mazes: a synthetic set whose pictures can be drawn only by taking many steps of search, with exact ground truth."""
