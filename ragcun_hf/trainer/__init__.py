"""From rows to a trained head: arguments, losses, inputs, the Trainer and its callbacks."""
