"""Folders that `evaluate.load` understands: one metric each, its script named after the folder."""
