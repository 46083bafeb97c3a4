"""Text to sentences, in languages that end them with a full stop and a space, and in Japanese, which has no spaces."""

from __future__ import annotations

import re

_JAPANESE = r"\u3000-\u30ff\u3400-\u9fff\uff00-\uffef"
# A blank line, or any line end after a Japanese character: Japanese text is not wrapped between words.
_LINE_END = re.compile(rf"\n\s*\n|\n(?<=[{_JAPANESE}]\n)")
_STOP_AND_SPACE = re.compile(r"""(?:[.!?]["')\]]*|:)\s+(?=["'(\[`*]*[A-Z])""")
# Words before a full stop that is not the end of a sentence; so is a single capital, the initial of a name.
_ABBREVIATIONS = {"Mr", "Mrs", "Ms", "Dr", "Prof", "St", "Mt", "vs", "cf", "e.g", "i.e", "Fig", "No", "Vol", "pp"}
_OPENING, _CLOSING = "「『（【〈《", tuple("」』）】〉》")
_JAPANESE_MARK = re.compile(rf"[{_OPENING}]|[{''.join(_CLOSING)}]+|[。！？]+")
# After a quotation: "…", he said. The sentence goes on.
_GOES_ON = ("、", "，", "と", "って", "など", "を", "は", "の", "も", "に")


def split_sentences(text: str) -> list[str]:
    """Sentences of a text, each on one line. A blank line always ends a sentence.

    A Japanese stop (。！？) ends a sentence together with the brackets that close after it, but not within brackets
    that are still open, nor where the text goes on after a quotation as in 「はい。」と言った.
    """
    return [
        sentence
        for line in _LINE_END.split(text)
        for part in _split_japanese(" ".join(line.split()))
        for sentence in _split_at_spaces(part)
    ]


def _split_japanese(line: str) -> list[str]:
    if not any(stop in line for stop in "。！？"):
        return [line]
    # Where brackets do not match, as in cut or broken text, none is heeded: an open one would swallow all that follows.
    paired = all(line.count(left) == line.count(right) for left, right in zip(_OPENING, _CLOSING))
    parts, start, depth, stop = [], 0, 0, -1
    for mark in _JAPANESE_MARK.finditer(line):
        first = mark[0][0]
        if first in _OPENING:
            depth += paired
            continue
        after_stop = mark.start() == stop
        stop = mark.end()
        if first in _CLOSING:
            depth = max(0, depth - paired * len(mark[0]))
            if not after_stop or line.startswith(_GOES_ON, stop):
                continue
        # Brackets that close right here belong to the sentence: they are the next mark.
        if depth == 0 and not line.startswith(_CLOSING, stop):
            parts.append(line[start:stop].strip())
            start = stop
    return [*parts, line[start:].strip()]


def _split_at_spaces(line: str) -> list[str]:
    if " " not in line:
        return [line] if line else []
    sentences, start = [], 0
    for end in _STOP_AND_SPACE.finditer(line):
        if line[end.start()] == "." and _abbreviated(line[start : end.start()]):
            continue
        sentences.append(line[start : end.end()].strip())
        start = end.end()
    sentences.append(line[start:].strip())
    return [s for s in sentences if s]


def _abbreviated(before: str) -> bool:
    word = before.rsplit(maxsplit=1)[-1].lstrip("(\"'[") if before.strip() else ""
    return word in _ABBREVIATIONS or (len(word) == 1 and word.isupper() and word != "I")
