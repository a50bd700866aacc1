"""A model from disk, or from a seed."""
