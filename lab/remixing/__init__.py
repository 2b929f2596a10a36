"""C3PO in comparison: every method on the same prompts, references and model, and what it costs."""
