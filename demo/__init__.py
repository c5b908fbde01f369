"""The demonstration: a corpus found on any machine, a small trained model, and how it was trained."""
