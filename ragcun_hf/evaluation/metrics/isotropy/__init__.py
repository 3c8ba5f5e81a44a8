"""How evenly vectors fill their space, as an `evaluate` metric."""
