"""Sentences to token ids, as a saved tokenizer gives them; Transformers is not loaded where it is not needed."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import lru_cache
from pathlib import Path
from typing import Any

from tokenizers import Tokenizer

Encode = Callable[[Sequence[str]], list[list[int]]]
_KNOWN_WORDS = 1 << 18


def load_encoder(folder: Path) -> tuple[Encode, int]:
    """A function from sentences to their ids without special tokens, and the size of the vocabulary.

    `[MASK]` and the like in the text are text to it.
    """
    file = folder / "tokenizer.json"
    if file.is_file():
        return _fast(Tokenizer.from_file(str(file)))
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(folder)
    by_word = getattr(tokenizer, "word_tokenizer", None) and getattr(tokenizer, "subword_tokenizer", None)
    return (_word_by_word if by_word else _slow)(tokenizer), len(tokenizer)


def _fast(tokenizer: Tokenizer) -> tuple[Encode, int]:
    tokenizer.encode_special_tokens = True
    tokenizer.no_truncation()
    tokenizer.no_padding()

    def encode(sentences: Sequence[str]) -> list[list[int]]:
        return [e.ids for e in tokenizer.encode_batch_fast(list(sentences), add_special_tokens=False)]

    return encode, tokenizer.get_vocab_size()


def _word_by_word(tokenizer: Any) -> Encode:
    """For BertJapaneseTokenizer: words recur, so that of each only the first is cut into pieces (4 times as fast)."""

    @lru_cache(_KNOWN_WORDS)
    def ids(word: str) -> list[int]:
        found: list[int] = tokenizer.convert_tokens_to_ids(tokenizer.subword_tokenizer.tokenize(word))
        return found

    def encode(sentences: Sequence[str]) -> list[list[int]]:
        return [[i for word in tokenizer.word_tokenizer.tokenize(s) for i in ids(word)] for s in sentences]

    return encode


def _slow(tokenizer: Any) -> Encode:
    def encode(sentences: Sequence[str]) -> list[list[int]]:
        ids: list[list[int]] = tokenizer(
            list(sentences), add_special_tokens=False, split_special_tokens=True, verbose=False
        )["input_ids"]
        return ids

    return encode
