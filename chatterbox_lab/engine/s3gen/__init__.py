"""Speech tokens to audio."""
