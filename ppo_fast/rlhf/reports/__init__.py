"""Reports of finished runs: curves, one HTML page, preference pairs."""
