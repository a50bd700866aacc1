"""What is seen and heard."""

from .. import released as released
