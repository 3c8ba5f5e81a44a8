"""Names of the files in which a model folder says how it was trained."""

RECORD_FILE = "training_record.json"
"""Data sources and counts, arguments, seconds, steps, and the log."""

DOCUMENTS_FILE = "training_documents.txt"
"""One hexadecimal digest per distinct training document."""
