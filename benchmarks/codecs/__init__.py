"""What the codecs cost and what they do to a run."""
