"""Evaluate a trained model: scores, sparse codes, a report."""
