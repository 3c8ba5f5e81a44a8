"""Model cards that can only show measured numbers."""
