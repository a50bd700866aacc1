"""How the lab voice is made: a small Chatterbox trained from nothing on the speech of a free synthesiser.

``python -m chatterbox_lab.training --help`` lists the stages; each is one command, resumable, and writes into a
folder of its own: ``text`` -> ``corpus`` -> ``t3``, ``flow`` and ``vocoder`` -> ``voice`` -> ``measure``.

The teacher is flite's voice ``rms``, whose speech and phone times are a function of the text. So the speech tokens
can be what Chatterbox's are meant to be, supervised and phonetic: a token says which phones its two frames belong
to and how high the voice is (`tokens`). T3 learns to write them from text, the flow to draw a mel from them.
"""

from .. import released as released
