"""Learns a WordPiece vocabulary from a source of text and saves it as a Hugging Face tokenizer.

    python train_tokenizer.py --config configs/demo.json --source python-docs --output runs/demo/tokenizer

With `"words": "mecab"` in the config, text is divided into words as Japanese needs it (by fugashi with the dictionary
unidic-lite) and the tokenizer is a `BertJapaneseTokenizer`; `pip install 'rannc_hf[japanese]'` installs both.
"""

from __future__ import annotations

import argparse
import os
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from functools import partial
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import TYPE_CHECKING

from corpus import Piece, find_pieces
from processes import in_processes
from sentences import split_sentences
from settings import Recipe, TokenizerSettings
from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, processors, trainers

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

SPECIAL_TOKENS = {
    "pad_token": "[PAD]",
    "unk_token": "[UNK]",
    "cls_token": "[CLS]",
    "sep_token": "[SEP]",
    "mask_token": "[MASK]",
}
_INPUTS = ["input_ids", "token_type_ids", "attention_mask"]
_MOST_REPEATS = 1000


def train_tokenizer(
    sentences: Iterable[str], settings: TokenizerSettings, sequence_length: int
) -> PreTrainedTokenizerBase:
    """A BERT tokenizer of at most `vocabulary_size` tokens; the special tokens have the ids 0 to 4, [PAD] first.

    `sequence_length` is the longest input, in tokens, that the tokenizer lets pass when asked to truncate. Equal
    sentences give an equal vocabulary.
    """
    return build_tokenizer(count_words(sentences, settings), settings, sequence_length)


def count_words(sentences: Iterable[str], settings: TokenizerSettings) -> Counter[str]:
    """How often each word is there, as the tokenizer divides and normalises text."""
    words: Counter[str] = Counter()
    divide = _word_divider(settings)
    for sentence in sentences:
        words.update(divide(sentence))
    return words


def build_tokenizer(words: Counter[str], settings: TokenizerSettings, sequence_length: int) -> PreTrainedTokenizerBase:
    """The tokenizer that `words` give, see `train_tokenizer`."""
    vocabulary = _learn_vocabulary(words, settings)
    build = _japanese_tokenizer if settings.words == "mecab" else _bert_tokenizer
    return build(vocabulary, settings, sequence_length)


def _bert_tokenizer(
    vocabulary: dict[str, int], settings: TokenizerSettings, sequence_length: int
) -> PreTrainedTokenizerBase:
    from transformers import PreTrainedTokenizerFast

    tokenizer = Tokenizer(models.WordPiece(vocabulary, unk_token="[UNK]"))
    tokenizer.normalizer = normalizers.BertNormalizer(lowercase=settings.lowercase)
    tokenizer.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    tokenizer.decoder = decoders.WordPiece(prefix="##")
    tokenizer.add_special_tokens(list(SPECIAL_TOKENS.values()))
    tokenizer.post_processor = processors.TemplateProcessing(
        single="[CLS]:0 $A:0 [SEP]:0",
        pair="[CLS]:0 $A:0 [SEP]:0 $B:1 [SEP]:1",
        special_tokens=[(token, vocabulary[token]) for token in ("[CLS]", "[SEP]")],
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        model_max_length=sequence_length,
        model_input_names=_INPUTS,
        **SPECIAL_TOKENS,
    )


def _japanese_tokenizer(
    vocabulary: dict[str, int], settings: TokenizerSettings, sequence_length: int
) -> PreTrainedTokenizerBase:
    from transformers import BertJapaneseTokenizer

    with TemporaryDirectory() as folder:
        file = Path(folder) / "vocab.txt"
        file.write_text("".join(f"{token}\n" for token in sorted(vocabulary, key=vocabulary.__getitem__)), "utf-8")
        return BertJapaneseTokenizer(
            str(file),
            do_lower_case=settings.lowercase,
            word_tokenizer_type="mecab",
            mecab_kwargs={"mecab_dic": "unidic_lite"},
            model_max_length=sequence_length,
            model_input_names=_INPUTS,
            **SPECIAL_TOKENS,
        )


def _word_divider(settings: TokenizerSettings) -> Callable[[str], list[str]]:
    """A function from a sentence to its words, normalised."""
    if settings.words == "mecab":
        from transformers.models.bert_japanese.tokenization_bert_japanese import MecabTokenizer

        mecab = MecabTokenizer(do_lower_case=settings.lowercase, mecab_dic="unidic_lite")
        divide: Callable[[str], list[str]] = mecab.tokenize
        return divide
    normalizer = normalizers.BertNormalizer(lowercase=settings.lowercase)
    pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    return lambda sentence: [w for w, _ in pre_tokenizer.pre_tokenize_str(normalizer.normalize_str(sentence))]


def _learn_vocabulary(words: Counter[str], settings: TokenizerSettings) -> dict[str, int]:
    """Token to id. The trainer meets words in the order of a hash map that differs from run to run, and gives ids to
    `##` characters as it meets them, on which ties between merges depend. So it gets those characters in advance.
    """
    characters: Counter[str] = Counter()
    for word, number in words.items():
        for character in word:
            characters[character] += number
    # Of equally frequent ones always the same.
    alphabet = sorted(sorted(characters), key=lambda c: -characters[c])[: settings.alphabet]
    known = set(alphabet)
    inner = sorted({character for word in words for character in word[1:]} & known)
    first = [*SPECIAL_TOKENS.values(), *(f"##{character}" for character in inner)]
    tokenizer = Tokenizer(models.WordPiece(unk_token="[UNK]"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    trainer = trainers.WordPieceTrainer(
        vocab_size=settings.vocabulary_size,
        min_frequency=2,
        special_tokens=first,
        continuing_subword_prefix="##",
        show_progress=False,
    )
    usable = {word: number for word, number in words.items() if known.issuperset(word)}
    tokenizer.train_from_iterator(_repeated(usable), trainer)
    vocabulary: dict[str, int] = tokenizer.get_vocab()
    return vocabulary


def _repeated(words: dict[str, int]) -> Iterator[str]:
    """Each word as often as it was counted: the trainer wants text."""
    for word in sorted(words):
        number = words[word]
        for done in range(0, number, _MOST_REPEATS):
            yield " ".join([word] * min(_MOST_REPEATS, number - done))


def _count_piece(settings: TokenizerSettings, share: int, piece: Piece) -> Counter[str]:
    def sentences() -> Iterator[str]:
        left = share
        for document in piece.documents():
            yield from split_sentences(document.text)
            left -= len(document.text.encode())
            if left <= 0:
                return

    return count_words(sentences(), settings)


def count_sources(pieces: list[Piece], settings: TokenizerSettings, workers: int) -> Counter[str]:
    """The words of the first part of each piece, together about `sample_megabytes`."""
    share = -(-settings.sample_megabytes * 1_000_000 // len(pieces))
    words: Counter[str] = Counter()
    for found in in_processes(partial(_count_piece, settings, share), pieces, workers, "counting words"):
        words.update(found)
    return words


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--config", required=True, help="a file of configs/")
    parser.add_argument("--set", nargs="+", default=[], metavar="SECTION.KEY=VALUE", help="change the config")
    parser.add_argument("--source", required=True, nargs="+", help="see corpus.py")
    parser.add_argument("--text-column", default="text", help="field that holds the text")
    parser.add_argument("--output", required=True, help="folder for the tokenizer")
    parser.add_argument("--workers", type=int, default=os.cpu_count() or 1, help="processes (all cores)")
    args = parser.parse_args()
    recipe = Recipe.load(args.config, args.set)
    words = count_sources(find_pieces(args.source, args.text_column), recipe.tokenizer, args.workers)
    longest = max(phase.data.sequence_length for phase in recipe.phases())
    tokenizer = build_tokenizer(words, recipe.tokenizer, longest)
    tokenizer.save_pretrained(args.output)
    print(f"{args.output}: a WordPiece tokenizer of {len(tokenizer):,} tokens, from {words.total():,} words")


if __name__ == "__main__":
    main()
