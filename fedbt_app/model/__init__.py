"""From a checkpoint on disk to a module that trains: weights, the local model, the exact step."""
