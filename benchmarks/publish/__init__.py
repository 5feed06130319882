"""From stored results to the tables and pictures of README and docs."""
