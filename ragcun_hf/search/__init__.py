"""Nearest-neighbour search over vectors: exact by default, approximate with faiss."""
