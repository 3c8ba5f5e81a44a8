"""Run the frozen encoder once per distinct text, and cache its features."""
