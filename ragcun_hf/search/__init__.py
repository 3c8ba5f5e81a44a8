"""Vectors in, the nearest rows out: exact search, and approximate search as an option."""
