"""Text to speech tokens."""
