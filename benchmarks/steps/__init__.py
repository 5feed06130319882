"""What a training step and a round cost one client."""
