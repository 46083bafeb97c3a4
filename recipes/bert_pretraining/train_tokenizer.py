"""Learns a WordPiece vocabulary from a source of text and saves it as a Hugging Face tokenizer.

python train_tokenizer.py --config configs/demo.json --source python-docs --output runs/demo/tokenizer
"""

from __future__ import annotations

import argparse
from collections.abc import Iterable

from corpus import read_documents, split_sentences
from settings import Recipe
from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, processors, trainers
from transformers import PreTrainedTokenizerFast

SPECIAL_TOKENS = {
    "pad_token": "[PAD]",
    "unk_token": "[UNK]",
    "cls_token": "[CLS]",
    "sep_token": "[SEP]",
    "mask_token": "[MASK]",
}


def train_tokenizer(
    sentences: Iterable[str], vocabulary_size: int, sequence_length: int, lowercase: bool = True
) -> PreTrainedTokenizerFast:
    """A BERT tokenizer of at most `vocabulary_size` tokens; the special tokens have the ids 0 to 4, [PAD] first.

    `sequence_length` is the longest input, in tokens, that the tokenizer lets pass when asked to truncate. Equal
    sentences give an equal vocabulary.
    """
    vocabulary = _learn_vocabulary(list(sentences), vocabulary_size, lowercase)
    tokenizer = _without_vocabulary(lowercase)
    tokenizer.model = models.WordPiece(vocabulary, unk_token="[UNK]")
    tokenizer.add_special_tokens(list(SPECIAL_TOKENS.values()))
    tokenizer.post_processor = processors.TemplateProcessing(
        single="[CLS]:0 $A:0 [SEP]:0",
        pair="[CLS]:0 $A:0 [SEP]:0 $B:1 [SEP]:1",
        special_tokens=[(token, vocabulary[token]) for token in ("[CLS]", "[SEP]")],
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        model_max_length=sequence_length,
        model_input_names=["input_ids", "token_type_ids", "attention_mask"],
        **SPECIAL_TOKENS,
    )


def _without_vocabulary(lowercase: bool) -> Tokenizer:
    tokenizer = Tokenizer(models.WordPiece(unk_token="[UNK]"))
    tokenizer.normalizer = normalizers.BertNormalizer(lowercase=lowercase)
    tokenizer.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    tokenizer.decoder = decoders.WordPiece(prefix="##")
    return tokenizer


def _learn_vocabulary(sentences: list[str], size: int, lowercase: bool) -> dict[str, int]:
    """Token to id. The trainer meets words in the order of a hash map that differs from run to run, and gives ids to
    `##` characters as it meets them, on which ties between merges depend. So it gets those characters in advance.
    """
    tokenizer = _without_vocabulary(lowercase)
    inner: set[str] = set()
    for sentence in sentences:
        for word, _ in tokenizer.pre_tokenizer.pre_tokenize_str(tokenizer.normalizer.normalize_str(sentence)):
            inner.update(word[1:])
    first = [*SPECIAL_TOKENS.values(), *(f"##{character}" for character in sorted(inner))]
    trainer = trainers.WordPieceTrainer(
        vocab_size=size, min_frequency=2, special_tokens=first, continuing_subword_prefix="##", show_progress=False
    )
    tokenizer.train_from_iterator(sentences, trainer)
    return tokenizer.get_vocab()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--config", required=True, help="a file of configs/")
    parser.add_argument("--source", required=True, help="see corpus.py")
    parser.add_argument("--text-column", default="text", help="field that holds the text")
    parser.add_argument("--output", required=True, help="folder for the tokenizer")
    args = parser.parse_args()
    recipe = Recipe.load(args.config)
    sentences = (s for d in read_documents(args.source, args.text_column) for s in split_sentences(d.text))
    tokenizer = train_tokenizer(
        sentences, recipe.tokenizer.vocabulary_size, recipe.data.sequence_length, recipe.tokenizer.lowercase
    )
    tokenizer.save_pretrained(args.output)
    print(f"{args.output}: a WordPiece tokenizer of {len(tokenizer):,} tokens")


if __name__ == "__main__":
    main()
