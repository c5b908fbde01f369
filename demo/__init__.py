"""The demonstration: text found on any machine, and a small model trained on it."""
