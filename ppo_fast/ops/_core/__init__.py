"""Parts that every op shares: registry of backends, checks of arguments, layouts, results."""
