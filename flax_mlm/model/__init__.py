"""The encoder: attention, layers, heads."""
