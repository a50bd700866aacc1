"""What the voice is trained to say: WordNet's example sentences, and a lexicon as the teacher pronounces it.

T3 reads phones for words of the lexicon and letters for all others. The lexicon is part of ``tokenizer.json``, as
a normalizer, so upstream's own tokenizer class reads it: no front end is needed.
"""

from __future__ import annotations

import json
import random
import re
import subprocess
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import tokenizers
from tokenizers import normalizers
from tqdm import tqdm

from ..files import written_whole
from ..study.trials import HELD_OUT
from ..voices.build import letter_tokenizer
from .phones import FIRST_ID, SYMBOLS, spelled

WORDNET = Path("/usr/share/wordnet")  # Debian's wordnet-base; its licence lets texts be used with notice
_EXAMPLE = re.compile(r'"([^"|]+)"')
_PLAIN = re.compile(r"[A-Za-z][a-z]*(?:'[a-z]+)?(?:,? [A-Za-z]?[a-z]*(?:'[a-z]+)?)*[?!]?")
_WORD = re.compile(r"[a-z']+")


def words(text: str) -> list[str]:
    """The words of a sentence in lower case, without punctuation."""
    return _WORD.findall(text.lower())


def sentences(count: int, seed: int = 0, wordnet: Path = WORDNET) -> list[str]:
    """Example sentences of WordNet of 3 to 16 words, none of them held out, in an order fixed by ``seed``.

    Raises:
        FileNotFoundError: WordNet's files are not there.
    """
    if not wordnet.is_dir():
        raise FileNotFoundError(f"{wordnet}: no WordNet there; on Debian: apt install wordnet-base")
    held_out = {" ".join(words(line)) for line in HELD_OUT.read_text().splitlines()}
    found = set()
    for file in sorted(wordnet.glob("data.*")):
        for example in _EXAMPLE.findall(file.read_text(errors="replace")):
            text = " ".join(example.split()).rstrip(" .;,")
            size = len(words(text))
            if 3 <= size <= 16 and _PLAIN.fullmatch(text) and " ".join(words(text)) not in held_out:
                text = text[0].upper() + text[1:]
                found.add(text if text[-1] in "?!" else f"{text}.")
    chosen = sorted(found)
    random.Random(seed).shuffle(chosen)
    return chosen[:count]


def pronunciations(vocabulary: list[str]) -> dict[str, str]:
    """How flite says each word on its own, such as ``"hh ax l ow1"``; words that it spells out or drops are left out.

    Raises:
        FileNotFoundError: flite's ``t2p`` is not installed.
    """

    def say(word: str) -> str:
        try:
            return subprocess.run(["t2p", word], capture_output=True, text=True, check=True).stdout
        except FileNotFoundError as error:
            raise FileNotFoundError("t2p: not installed; on Debian: apt install flite") from error

    with ThreadPoolExecutor(4) as pool:
        said = list(tqdm(pool.map(say, vocabulary), total=len(vocabulary), desc="pronunciations", unit="word"))
    found = {word: " ".join(phones.split()[1:-1]) for word, phones in zip(vocabulary, said, strict=True)}
    return {word: phones for word, phones in found.items() if phones and "pau" not in phones.split()}


def common_words(count: int) -> list[str]:
    """The most frequent English words by ``wordfreq`` (the extra ``train``), letters and apostrophes only."""
    import wordfreq

    return [word for word in wordfreq.top_n_list("en", 2 * count) if _WORD.fullmatch(word)][:count]


def tokenizer(lexicon: dict[str, str]) -> tokenizers.Tokenizer:
    """Letters, and phones for the words of the lexicon, which the normalizer replaces (longest first)."""
    plain = json.loads(letter_tokenizer().to_str())
    plain["model"]["vocab"] |= {symbol: FIRST_ID + i for i, symbol in enumerate(SYMBOLS.values())}
    built = tokenizers.Tokenizer.from_str(json.dumps(plain))
    ordered = sorted(lexicon, key=lambda word: (-len(word), word))
    whole = r"(?<!\w)(?<!\w'){}(?!'?\w)"  # the end of "sister's" is no word of its own
    replace = [normalizers.Replace(tokenizers.Regex(whole.format(word)), spelled(lexicon[word])) for word in ordered]
    built.normalizer = normalizers.Sequence([normalizers.Lowercase(), *replace])
    return built


def prepare(folder: Path, count: int, lexicon_size: int, seed: int = 0) -> None:
    """Writes ``sentences.json``, ``lexicon.json`` (all words pronounced) and ``tokenizer.json`` into ``folder``."""
    folder.mkdir(parents=True, exist_ok=True)
    chosen = sentences(count, seed)
    common = common_words(lexicon_size)
    seen = Counter(word for text in chosen for word in words(text))
    lexicon = pronunciations(sorted({*common, *seen}))
    kept = {word: lexicon[word] for word in common if word in lexicon}
    for name, value in (("sentences.json", chosen), ("lexicon.json", lexicon)):
        with written_whole(folder / name) as part:
            part.write_text(json.dumps(value, indent=0, ensure_ascii=False))
    with written_whole(folder / "tokenizer.json") as part:
        tokenizer(kept).save(str(part), pretty=False)
    print(f"{len(chosen)} sentences, {len(seen)} different words; {len(kept)} words in the tokenizer's lexicon")
