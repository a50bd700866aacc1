"""Text to audio. Read it in this order:

- `settings` (what can be asked for), `schedule` (how large each chunk is), `request` (one utterance, checked);
- `stream`: the loop of T3, S3Gen and watermark;
- `t3`, text to speech tokens: `decode`, `backends` (what can run T3), of which `attention`, `static` and `compiled` run
  through `eager`, and `graph` by itself; `backbone` (Llama's layers and GPT-2's); `sampling`, `alignment`, `spies`;
- `s3gen`, speech tokens to audio: `render`, `flow` with `encoder` and `unet`, `vocoder` with `hift`;
- beside them `overlap` (the same stages in threads), `warm`, `patch` (the drop-in), `clock` and `linears`;
- below them, shared with `voices`: `kept` (what is made of weights and kept with them), `host` (how the application has
  set PyTorch up, kept away) and `recordings` (whose voice is taken).
"""

from .. import released as released
