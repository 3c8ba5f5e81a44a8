"""The official retrieval figures as an `evaluate` metric."""
