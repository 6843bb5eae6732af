"""Models: paths -> networks -> hidden states."""
