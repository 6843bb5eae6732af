"""Data: rows on disk -> token ids -> batches."""
