"""HTML from nested calls, with every text escaped; and figures as people read them."""

from __future__ import annotations

import html
from collections.abc import Iterable, Sequence
from itertools import groupby

_VOID = frozenset({"meta", "br"})


class Html(str):
    """Text that is markup already."""

    __slots__ = ()


def tag(name: str, /, *children: str | None, **attributes: object) -> Html:
    """An element. Children that are not `Html` are escaped; None is left out, among attributes too.

    Attributes are named as in HTML, with `_` for `-` and `class_` for class.
    """
    pairs = [
        f' {key.rstrip("_").replace("_", "-")}="{html.escape(str(value))}"'
        for key, value in attributes.items()
        if value is not None
    ]
    opening = f"<{name}{''.join(pairs)}>"
    return Html(opening if name in _VOID else f"{opening}{join(children)}</{name}>")


def join(parts: Iterable[str | None]) -> Html:
    """Parts one after the other; those that are not `Html` are escaped."""
    return Html("".join(p if isinstance(p, Html) else html.escape(p) for p in parts if p is not None))


def table(headings: Sequence[str], rows: Iterable[Sequence[str | None]], class_: str = "", first: str = "") -> Html:
    """A table that becomes a list of cards on a narrow screen; `first` is the class of the first row."""
    head = tag("tr", *(tag("th", h, scope="col") for h in headings))
    body = []
    for index, row in enumerate(rows):
        cells = [tag("td", tag("div", c), data_h=h) for h, c in zip(headings, row)]
        body.append(tag("tr", *cells, class_=first if index == 0 and first else None))
    return tag("table", tag("thead", head), tag("tbody", *body), class_=class_ or None)


def legend(entries: Iterable[tuple[str, str]], *others: Html) -> Html:
    """What colours mean: (class of the swatch, its meaning)."""
    return tag("div", *(tag("span", tag("i", class_=c), text) for c, text in entries), *others, class_="legend")


def duration(microseconds: float) -> str:
    """Three digits or so, in the unit that fits: 189 µs, 34.7 ms, 2.44 s."""
    for unit, factor in (("s", 1e6), ("ms", 1e3)):
        if abs(microseconds) >= factor:
            return f"{_digits(microseconds / factor)}\u00a0{unit}"
    return f"{microseconds:.0f}\u00a0µs"


def count(number: float) -> str:
    """A number of elements: 512, 3.2 k, 12.6 M, 4.97 B."""
    for unit, factor in (("B", 1e9), ("M", 1e6), ("k", 1e3)):
        if number >= factor:
            return f"{_digits(number / factor)}\u00a0{unit}"
    return f"{number:.0f}"


def _digits(number: float) -> str:
    return f"{number:.{2 if abs(number) < 10 else 1 if abs(number) < 100 else 0}f}"


def plural(number: int, word: str) -> str:
    """1 stage, 2 stages, 3 microbatches."""
    ending = "" if number == 1 else "es" if word.endswith("ch") else "s"
    return f"{number:,}\u00a0{word}{ending}"


def rank_list(ranks: Sequence[int]) -> str:
    """rank 3, ranks 0–7, ranks 0, 2, 5."""
    if len(ranks) == 1:
        return f"rank\u00a0{ranks[0]}"
    if list(ranks) == list(range(ranks[0], ranks[0] + len(ranks))):
        return f"ranks\u00a0{ranks[0]}–{ranks[-1]}"
    return f"ranks\u00a0{', '.join(map(str, ranks))}"


def runs(items: Sequence[object]) -> str:
    """Equal neighbours together: 8, 8, 4, 8 as 2×8, 4, 8; only one entry where all are equal."""
    groups = [(len(list(same)), str(item)) for item, same in groupby(items)]
    if len(groups) == 1:
        return f"{groups[0][1]} each" if groups[0][0] > 1 and groups[0][1].isdigit() else groups[0][1]
    return ", ".join(f"{n}×{item}" if n > 1 else item for n, item in groups)
