"""Text to audio."""
