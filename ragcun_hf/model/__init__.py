"""The model: its configuration, its forward pass, and where one comes from; `*_isotropic_gaussian.py` travel."""
