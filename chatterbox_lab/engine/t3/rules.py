"""When the alignment guard acts, as numbers."""

from __future__ import annotations

import math
from dataclasses import dataclass, fields


@dataclass(frozen=True)
class Rules:
    """Thresholds of the guard; ``inf`` switches one off. Attention is summed over speech tokens of 40 ms each.

    Args:
        long_tail: attention on one of the last three text tokens, after the text is complete, from which on the end is
            forced: 10 is two fifths of a second of a held last sound.
        repetition: attention on earlier text after completion, beyond which the end is forced.
        equal_tokens: as many equal speech tokens in a row force the end, at least 2.
        shortest: in texts of so many tokens, start and stop included, the stop token is never suppressed: the lab voice
            would go on and make up what it cannot read.
        early: speech tokens for each text token, beyond which a stop is not early and not suppressed: in a long text,
            where the alignment may be lost, no stop would ever be let pass.
        cap: speech tokens at most for each text token, besides ``cap_beside``.
        cap_beside: speech tokens that a text of any length may take besides.
        trims: whether speech that has said all of its text, and looks back into it when it ends, is cut to where it
            left the text's end. It is held back until that is known.

    Raises:
        ValueError: names the field, its value and what is allowed.
    """

    long_tail: float = 10.0
    repetition: float = 5.0
    equal_tokens: float = math.inf
    shortest: float = 30
    early: float = 1.0
    cap: float = 6.0
    cap_beside: float = 25.0
    trims: bool = True

    def __post_init__(self) -> None:
        least = {"equal_tokens": 2}
        if not isinstance(self.trims, bool):
            raise ValueError(f"trims={self.trims!r}: must be True or False")
        for name in (field.name for field in fields(self) if field.name != "trims"):
            value, lowest = getattr(self, name), least.get(name, 0)
            if isinstance(value, bool) or not isinstance(value, (int, float)) or not value >= lowest:
                raise ValueError(f"{name}={value!r}: must be a number from {lowest}, or infinity")

    def most(self, text_tokens: int) -> int | float:
        """Speech tokens at most for a text of so many tokens, start and stop included: at least 1, or infinity."""
        most = self.cap_beside + self.cap * max(1, text_tokens - 2)
        return most if math.isinf(most) else max(1, int(most))


SAFE = Rules()
"""What is left when rules that did harm are gone (notebook 08)."""
AS_RELEASED = {"early": math.inf, "cap": math.inf, "trims": False}
FORK = Rules(shortest=0, **AS_RELEASED)
"""As in the analyzer of chatterbox-streaming 0.1.2, where the rules are present but never called."""
LATER = Rules(long_tail=5.0, equal_tokens=3, shortest=5, **AS_RELEASED)
"""As in Multilingual of chatterbox-tts 0.1.7, except that three equal tokens force the end, which its comment says, and
not two, as its code has it: a held vowel has two."""
