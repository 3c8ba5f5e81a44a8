"""Search, official metrics and honest comparison with the frozen base."""
