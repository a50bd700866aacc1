"""A model from disk, or from a seed: `load`, `config` (its sizes), `build`, `folder` (read and written), `head`."""

from .. import released as released
