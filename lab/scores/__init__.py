"""Scores of a trained model, which expert does what, and the last words of stories."""
