"""What carries it: one file a model family."""
