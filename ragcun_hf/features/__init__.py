"""The frozen encoder, run once per distinct text."""
