"""The teacher's phones, and the characters by which the text tokenizer writes them."""

from __future__ import annotations

PAUSE = "pau"
_VOWELS = "aa ae ah ao aw ax ay eh er ey ih iy ow oy uh uw"
_UNVOICED, _VOICED = "ch f hh k p s sh t th", "b d dh g jh l m n ng r v w y z zh"
VOWELS, VOICED = _VOWELS.split(), {*_VOWELS.split(), *_VOICED.split()}
PHONES = (PAUSE, *VOWELS, *sorted(f"{_UNVOICED} {_VOICED}".split()))  # flite's US English set
FIRST_ID = 256  # of the text vocabulary: below are [STOP], letters and [START], as `models.letter_tokenizer` has them

# One character a phone, and one more for a vowel under stress. They come from Unicode's IPA block because no text
# holds them; which stands for which is this order, not phonetics.
SYMBOLS = {phone: chr(0x250 + i) for i, phone in enumerate((*PHONES[1:], *(f"{vowel}1" for vowel in VOWELS)))}


def spelled(pronunciation: str) -> str:
    """A pronunciation as characters: ``"hh ax l ow1"`` -> four of them. Raises ValueError for an unknown phone."""
    unknown = [phone for phone in pronunciation.split() if phone not in SYMBOLS]
    if unknown:
        raise ValueError(f"pronunciation={pronunciation!r}: {unknown[0]!r} is no phone of the teacher")
    return "".join(SYMBOLS[phone] for phone in pronunciation.split())
