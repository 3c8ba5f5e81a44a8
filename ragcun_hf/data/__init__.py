"""Read files, folders and Hub datasets into checked rows of text."""
