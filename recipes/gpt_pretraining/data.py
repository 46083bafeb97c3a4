"""Text to tokens for a causal language model: a byte-level BPE tokenizer, and token files read without loading them.

    python data.py --output runs/gpt-demo/data [--vocabulary 2048] [FILE …]

A FILE is `.txt`, one document, or `.jsonl`, where each line is a document with its text under `text`. Without a FILE
the help topics that come with Python are the text, about half a million characters, so that a demo needs no network.
Documents are read and written one by one, so a corpus may be larger than memory. Each goes, whole, to `train.bin` or
to `held_out.bin`, followed by the end-of-text token.
"""

from __future__ import annotations

import argparse
import hashlib
import json
from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np
import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from torch.utils.data import Dataset
from transformers import PreTrainedTokenizerFast

END_OF_TEXT = "<|endoftext|>"
SPLITS = ("train", "held_out")


class TokenBlocks(Dataset[dict[str, torch.Tensor]]):
    """Consecutive pieces of `length` tokens of a file that `prepare` wrote; the last, shorter one is left out.

    A sample has `input_ids` and `labels`, both [length], int64 and equal: the model shifts them itself.
    Raises ValueError where the file is missing or has no whole piece.
    """

    def __init__(self, folder: Path, split: str, length: int) -> None:
        path = folder / f"{split}.bin"
        if not path.is_file():
            raise ValueError(f"{path} is missing; data.py writes it")
        dtype = json.loads((folder / "tokens.json").read_text(encoding="utf-8"))["dtype"]
        size = path.stat().st_size // np.dtype(dtype).itemsize
        if size < length:
            raise ValueError(f"{path} has {size} tokens, less than one piece of {length}; it takes more text")
        self._tokens = np.memmap(path, dtype=dtype, mode="r")
        self._length = length

    def __len__(self) -> int:
        return len(self._tokens) // self._length

    def __getitem__(self, index: int) -> dict[str, torch.Tensor]:
        start = index * self._length
        tokens = torch.from_numpy(self._tokens[start : start + self._length].astype(np.int64))
        return {"input_ids": tokens, "labels": tokens}


def documents(files: Sequence[Path]) -> Iterator[str]:
    """The texts of `files`, or Python's help topics where there are none.

    Raises ValueError for a file of another kind, and for a line that is no JSON object with a `text`.
    """
    if not files:
        from pydoc_data.topics import topics

        yield from topics.values()
    for path in files:
        if path.suffix == ".txt":
            yield path.read_text(encoding="utf-8")
        elif path.suffix == ".jsonl":
            with path.open(encoding="utf-8") as lines:
                for number, line in enumerate(lines, 1):
                    yield _text(line, f"{path}, line {number}")
        else:
            raise ValueError(f"{path}: files are .txt or .jsonl")


def _text(line: str, where: str) -> str:
    try:
        text = json.loads(line)["text"]
    except (ValueError, TypeError, KeyError) as error:
        raise ValueError(f"{where}: expected a JSON object with `text`, and got {line[:60]!r}") from error
    if not isinstance(text, str):
        raise ValueError(f"{where}: `text` must be a string, and is {text!r}")
    return text


def train_tokenizer(texts: Iterator[str], vocabulary: int) -> PreTrainedTokenizerFast:
    """A byte-level BPE of at most `vocabulary` tokens: every text is made of them, without an unknown one."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=vocabulary, special_tokens=[END_OF_TEXT], initial_alphabet=alphabet, show_progress=False
    )
    tokenizer.train_from_iterator(texts, trainer)
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, bos_token=END_OF_TEXT, eos_token=END_OF_TEXT)


def prepare(files: Sequence[Path], output: Path, vocabulary: int, held_out: float) -> dict[str, int]:
    """Write the tokenizer and the tokens of both parts; returns the number of tokens of each.

    Which part a document goes to depends on its text alone: a repeated document cannot be in both.
    """
    if not 0 < held_out < 1:
        raise ValueError(f"held_out={held_out} must be between 0 and 1")
    tokenizer = train_tokenizer(documents(files), vocabulary)
    dtype = np.uint16 if len(tokenizer) <= 1 << 16 else np.uint32
    output.mkdir(parents=True, exist_ok=True)
    counts = dict.fromkeys(SPLITS, 0)
    parts = {split: (output / f"{split}.bin.part").open("wb") for split in SPLITS}
    for text in documents(files):
        share = int.from_bytes(hashlib.sha256(text.encode()).digest()[:8], "big") / (1 << 64)
        split = SPLITS[share < held_out]
        ids = [*tokenizer(text, verbose=False)["input_ids"], tokenizer.eos_token_id]
        parts[split].write(np.array(ids, dtype=dtype).tobytes())
        counts[split] += len(ids)
    tokenizer.save_pretrained(output / "tokenizer")
    (output / "tokens.json").write_text(json.dumps({"dtype": np.dtype(dtype).name, **counts}) + "\n", encoding="utf-8")
    for split, part in parts.items():
        part.close()
        # Under its name only when complete.
        Path(part.name).rename(output / f"{split}.bin")
    return counts


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("files", nargs="*", type=Path, metavar="FILE")
    parser.add_argument("--output", type=Path, required=True)
    parser.add_argument("--vocabulary", type=int, default=2048, help="tokens at most, 257 at least")
    parser.add_argument("--held-out", type=float, default=0.1, help="share of the documents")
    args = parser.parse_args()
    counts = prepare(args.files, args.output, args.vocabulary, args.held_out)
    print(f"{args.output}: " + ", ".join(f"{n:,} tokens {split.replace('_', '-')}" for split, n in counts.items()))


if __name__ == "__main__":
    main()
