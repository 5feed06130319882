"""How tensors travel: number formats, their bytes, and what a lossy one remembers."""
