"""Data for pretraining runs on machines without a network: installed documentation, or random tokens."""

from __future__ import annotations

import ast
import json
import random
import re
import subprocess
import sys
import sysconfig
import warnings
from collections.abc import Iterator
from pathlib import Path

from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

_LEAST = 200
"""Characters of a document that is kept."""
_NOT_DOCUMENTATION = {"test", "tests", "testing", "_pytest"}
_BLANK_LINE = re.compile(r"\n\s*\n")
_SPECIAL = ("[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]")
_DOCUMENTS, _SENTENCES, _WORDS = 60, 40, 200
"""Of random text: about half a million words."""


def from_packages(folder: Path, config: Path, recipe: Path) -> None:
    """Prepares the docstrings of the standard library and of all packages of this Python in `folder`.

    How much that is depends on what is installed; PyTorch and Transformers alone bring over a million words.
    """
    folder.mkdir(parents=True, exist_ok=True)
    corpus = folder / "corpus.jsonl"
    with corpus.open("w", encoding="utf-8") as file:
        for text in _documentation():
            file.write(json.dumps({"text": text}) + "\n")
    common = ["--config", str(config), "--source", str(corpus)]
    _run(recipe / "train_tokenizer.py", *common, "--output", str(folder / "tokenizer"))
    _run(recipe / "prepare.py", *common, "--tokenizer", str(folder / "tokenizer"), "--output", str(folder / "data"))


def _documentation() -> Iterator[str]:
    """The prose in the docstrings of each Python file; a paragraph that several have is kept once."""
    seen: set[str] = set()
    for kind in ("stdlib", "purelib"):
        root = Path(sysconfig.get_path(kind))
        for path in sorted(root.rglob("*.py")):
            parts = path.relative_to(root).parts
            if _NOT_DOCUMENTATION.isdisjoint(parts) and (kind == "purelib" or "site-packages" not in parts):
                text = "\n\n".join(_prose(path, seen))
                if len(text) >= _LEAST:
                    yield text


def _prose(path: Path, seen: set[str]) -> Iterator[str]:
    """Paragraphs that are mostly words, each on one line."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            tree = ast.parse(path.read_bytes())
    except (SyntaxError, ValueError, RecursionError):
        return
    kinds = (ast.Module, ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef)
    for node in ast.walk(tree):
        for paragraph in _BLANK_LINE.split((isinstance(node, kinds) and ast.get_docstring(node)) or ""):
            flat = " ".join(paragraph.split())
            letters = sum(character.isalpha() for character in flat)
            if (
                letters >= 20
                and letters >= 0.75 * len(flat.replace(" ", ""))
                and ">>>" not in flat
                and flat not in seen
            ):
                seen.add(flat)
                yield flat


def random_tokens(folder: Path, config: Path, recipe: Path) -> None:
    """Prepares sentences of random words in `folder`, as many different ones as the config's vocabulary has tokens."""
    size = json.loads(config.read_text(encoding="utf-8"))["tokenizer"]["vocabulary_size"]
    words = [f"w{number}" for number in range(size - len(_SPECIAL))]
    folder.mkdir(parents=True, exist_ok=True)
    tokenizer = Tokenizer(models.WordLevel({w: i for i, w in enumerate((*_SPECIAL, *words))}, unk_token="[UNK]"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    names = {f"{token.strip('[]').lower()}_token": token for token in _SPECIAL}
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, **names).save_pretrained(folder / "words")
    generator = random.Random(0)
    sentences = (" ".join(generator.choices(words, k=_WORDS)) for _ in range(_DOCUMENTS * _SENTENCES))
    text = "".join(f"{line}\n" + "\n" * (i % _SENTENCES == 0) for i, line in enumerate(sentences, start=1))
    (folder / "corpus.txt").write_text(text, encoding="utf-8")
    common = ["--config", str(config), "--source", str(folder / "corpus.txt")]
    _run(recipe / "prepare.py", *common, "--tokenizer", str(folder / "words"), "--output", str(folder / "data"))


def _run(program: Path, *words: str) -> None:
    subprocess.run([sys.executable, str(program), *words], check=True)
