"""What a head is trained for: its arguments, batches of features, the three loss terms and their weighted sum."""
