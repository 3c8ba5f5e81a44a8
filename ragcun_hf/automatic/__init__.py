"""Settings for documents without labels, chosen by pseudo-queries of documents held out."""
