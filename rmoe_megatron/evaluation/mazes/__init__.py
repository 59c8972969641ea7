"""The mazes benchmark: pictures are decoded cell by cell, and compared with what a search finds."""
