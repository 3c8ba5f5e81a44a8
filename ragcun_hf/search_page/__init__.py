"""The page that shows the rankings of the frozen base and of the trained model side by side."""
