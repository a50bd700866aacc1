"""T3 learns to write the teacher's speech tokens from text, and to look at the phone it is saying while it does."""

from __future__ import annotations

import random
import re
from contextlib import ExitStack
from dataclasses import dataclass
from functools import partial

import torch
import torch.nn.functional as F
from chatterbox.models.t3 import T3
from chatterbox.models.t3.modules.cond_enc import T3Cond

from ..engine.t3.attention import FORK_HEADS, LATER_HEADS, watching_sdpa
from .corpus import Utterance
from .loop import padded
from .phones import FIRST_ID, SYMBOLS
from .tokens import CodeEmbedding, codes

SPELLED = 0.15  # of the words are given as letters, for the words that no lexicon has (representation mixing)
WITHOUT_TEXT = 0.12  # of the sentences, for classifier-free guidance
SENTENCES = (1, 1, 1, 2, 4)  # that an example has, each as often: texts are longer than WordNet's sentences
WRONG = 0.05  # of the tokens T3 is fed are others' tokens: it must recover from its own mistakes
_PIECE = re.compile(r"[a-z']+|[ ,.?!]")


@dataclass
class Example:
    """A sentence for T3: ``text`` ids with [START] and [STOP], its ``speech`` tokens, and where in the text each is.

    ``position`` has one entry more than ``speech``: the place that T3 looks at when it stops.
    """

    text: torch.Tensor
    speech: torch.Tensor
    position: torch.Tensor


class TextCodec:
    """Text ids as the voice's tokenizer would give them, with chosen words spelled in letters."""

    def __init__(self, ids: dict[str, int], lexicon: dict[str, str], start: int, stop: int) -> None:
        self.ids, self.lexicon, self.start, self.stop = ids, lexicon, start, stop

    def example(self, item: Utterance, spelled: float, draw: random.Random) -> Example:
        """The utterance with each word spelled in letters with probability ``spelled``."""
        ids, frames, word = [self.start], [0] * len(item.mel), 0
        for piece in _PIECE.findall(item.text.lower()):
            if piece in " ,.?!":
                ids.append(self.ids["[SPACE]" if piece == " " else piece])
                continue
            names = self.lexicon[piece].split()
            own = [self.ids[c] for c in piece] if draw.random() < spelled else [self.ids[SYMBOLS[n]] for n in names]
            for i, (_, first, end) in enumerate(item.spans[word]):
                frames[first:end] = [len(ids) + i * len(own) // len(item.spans[word])] * (end - first)
            ids += own
            # The pause after a word belongs to what stands there: a space, a comma, the end.
            after = item.spans[word + 1][0][1] if word + 1 < len(item.spans) else len(frames)
            frames[item.spans[word][-1][2] : after] = [len(ids)] * (after - item.spans[word][-1][2])
            word += 1
        ids.append(self.stop)
        first = item.spans[0][0][1]
        frames[:first] = [1] * first
        position = torch.tensor([*frames[::2], len(ids) - 1])
        return Example(torch.tensor(ids), torch.from_numpy(codes(item)), position)


def text_codec(vocabulary: dict[str, int], lexicon: dict[str, str], t3: T3) -> TextCodec:
    """The codec of a tokenizer's vocabulary. Raises ValueError where it lacks the teacher's phones."""
    if vocabulary.get(next(iter(SYMBOLS.values()))) != FIRST_ID:
        raise ValueError(f"vocabulary: has no phones from id {FIRST_ID} on; make it with the stage 'text'")
    return TextCodec(vocabulary, lexicon, t3.hp.start_text_token, t3.hp.stop_text_token)


def prepare(t3: T3) -> T3:
    """Gives T3 the embedding and head that share what codes have in common; `finish` takes them out again."""
    rows, size = t3.hp.speech_tokens_dict_size, t3.dim
    t3.speech_emb = CodeEmbedding(rows, size)
    t3.speech_head = _Head(rows, size)
    for table in (t3.text_emb, t3.text_pos_emb.emb, t3.speech_pos_emb.emb):
        torch.nn.init.normal_(table.weight, std=1.0 if table is t3.text_emb else 0.1)
    return t3


def finish(t3: T3) -> dict[str, torch.Tensor]:
    """T3's weights in the released layout: the shared vectors written out as plain tables."""
    state = {key: value for key, value in t3.state_dict().items() if not key.startswith(("speech_emb", "speech_head"))}
    return state | {"speech_emb.weight": t3.speech_emb.weight(), "speech_head.weight": t3.speech_head.table.weight()}


class _Head(torch.nn.Module):
    def __init__(self, rows: int, size: int) -> None:
        super().__init__()
        self.table = CodeEmbedding(rows, size, scale=size**-0.5, own=True)

    def forward(self, hidden: torch.Tensor) -> torch.Tensor:
        return F.linear(hidden, self.table.weight())


def speaker(t3: T3) -> T3Cond:
    """The one speaker's conditionals: no reference speech, so the prompt is a speaker vector and an emotion."""
    size = t3.hp.speaker_embed_size
    return T3Cond(speaker_emb=torch.full((1, size), size**-0.5), emotion_adv=0.5 * torch.ones(1, 1, 1))


def losses(t3: T3, batch: list[Example], *, training: bool = True) -> dict[str, torch.Tensor]:
    """Cross-entropy of the next token, attention away from the right phone, and the size of the logits.

    T3 is fed its start token twice, as upstream's inference does. The logits' own sum is held near one because
    upstream's repetition penalty multiplies logits: near zero, a token that is certain stays so when it is repeated.
    """
    start, stop = t3.hp.start_speech_token, t3.hp.stop_speech_token
    rows, offsets = [], []
    cond = t3.prepare_conditioning(speaker(t3))[0]
    heard = torch.cat([example.speech for example in batch])
    for example in batch:
        text = t3.text_emb(example.text)
        if training and torch.rand(()) < WITHOUT_TEXT:
            text = torch.zeros_like(text)
        fed = example.speech
        if training:
            other = heard[torch.randint(len(heard), fed.shape)]
            fed = torch.where(torch.rand(fed.shape) < WRONG, other, fed)
        fed = torch.cat([torch.tensor([start, start]), fed])
        place = torch.cat([torch.tensor([0]), torch.arange(len(fed) - 1)])
        speech = t3.speech_emb(fed) + t3.speech_pos_emb.emb(place)
        rows.append(torch.cat([cond, text + t3.text_pos_emb.emb(torch.arange(len(text))), speech]))
        offsets.append(len(cond) + len(text) + 1)  # the second start token: the first place that predicts
    targets = padded([torch.cat([example.speech, torch.tensor([stop])]) for example in batch], -100)
    asked = torch.tensor(offsets)[:, None] + torch.arange(targets.shape[1])
    looked: dict[tuple[int, int | None], torch.Tensor] = {}
    hidden = _read(t3, padded(rows), asked, looked)
    known = targets != -100
    logits = t3.speech_head(hidden[known])
    place = padded([example.position for example in batch]) + len(cond)
    seen = [-_attended(maps, place)[known].clamp_min(1e-4).log().mean() for maps in looked.values()]
    return {
        "entropy": F.cross_entropy(logits, targets[known]),
        "attention": 0.1 * torch.stack(seen).mean(),
        "size": 1e-3 * logits.logsumexp(-1).square().mean(),
    }


def _read(t3: T3, embeds: torch.Tensor, asked: torch.Tensor, looked: dict) -> torch.Tensor:
    """Hidden states (B, S, C) at the positions asked for; ``looked`` gets their attention (B, S, T) by head."""
    asked = asked.clamp(max=embeds.shape[1] - 1)

    def read(layer: int, query: torch.Tensor, key: torch.Tensor, scale: float | None) -> None:
        heads = [head for index, head in (*FORK_HEADS, *LATER_HEADS) if index == layer]
        index = asked[:, None, :, None].expand(-1, query.shape[1], -1, query.shape[3])
        scores = query.gather(2, index) @ key.transpose(2, 3) * (scale or query.shape[-1] ** -0.5)
        future = torch.arange(key.shape[2]) > asked[:, None, :, None]
        maps = scores.masked_fill(future, float("-inf")).softmax(-1)
        for head in heads:
            looked[layer, head] = maps.mean(1) if head is None else maps[:, head]

    with ExitStack() as stack:
        for layer in {layer for layer, _ in (*FORK_HEADS, *LATER_HEADS)}:
            stack.enter_context(watching_sdpa(t3.tfmr.layers[layer].self_attn, partial(read, layer)))
        hidden = t3.tfmr(inputs_embeds=embeds, use_cache=False).last_hidden_state
    return hidden.gather(1, asked[..., None].expand(-1, -1, hidden.shape[-1]))


def _attended(maps: torch.Tensor, place: torch.Tensor) -> torch.Tensor:
    """Attention (B, S) on the right text token, its neighbours counted half."""
    near = [(0, 1.0), (-1, 0.5), (1, 0.5)]
    return sum(part * maps.gather(2, (place + shift)[..., None])[..., 0] for shift, part in near)


class Batches:
    """Sentences of like length together; which ones is drawn from the step's number alone."""

    def __init__(self, items: list[Utterance], codec: TextCodec, size: int) -> None:
        self.items, self.codec, self.size = sorted(items, key=lambda item: len(item.mel)), codec, size

    def __call__(self, step: int, spelled: float = SPELLED, several: bool = True) -> list[Example]:
        """The batch of a step, of one sentence each or of ``several``."""
        draw = random.Random(step)
        first = draw.randrange(max(1, len(self.items) - 4 * self.size))
        chosen = draw.sample(self.items[first : first + 4 * self.size], min(self.size, len(self.items)))
        single = [self.codec.example(item, spelled, draw) for item in chosen]
        count = draw.choice(SENTENCES) if several else 1
        return [joined(single[i : i + count], self.codec.ids["[SPACE]"]) for i in range(0, len(single), count)]


def joined(examples: list[Example], space: int) -> Example:
    """Sentences said one after the other, with a space between them."""
    text, speech, position = examples[0].text, [examples[0].speech], [examples[0].position[:-1]]
    for example in examples[1:]:
        position.append(example.position[:-1] + len(text) - 1)  # its [START] falls on the space
        text = torch.cat([text[:-1], torch.tensor([space]), example.text[1:]])
        speech.append(example.speech)
    return Example(text, torch.cat(speech), torch.cat([*position, torch.tensor([len(text) - 1])]))
