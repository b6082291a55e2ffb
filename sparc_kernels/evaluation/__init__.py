"""What a trained model is worth: scores, sparse codes, a report."""
