"""What the server does: rounds, who takes part, the global state, and going on after a stop."""
