"""The model, and how one is made or loaded. A copy of `*_isotropic_gaussian.py` is published with every model."""
