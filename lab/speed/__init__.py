"""Time and memory, measured side by side."""
