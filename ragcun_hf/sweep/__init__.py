"""Many heads on the same cached features: which settings are worth it."""
