"""Command lines, run folders, figures and statistics: what every experiment needs."""
