"""The global batch: every rank passes its own shard, as under data parallel training; all ranks see the whole."""

from __future__ import annotations

import hashlib
import logging
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from rannc_hf.capture.folded import fold, rows_of
from rannc_hf.capture.passes.masks import MASK_FIELDS
from rannc_hf.engine.transport import Transport

logger = logging.getLogger(__name__)
_NOT_HIDDEN = (
    "rannc: lengths are not rounded up to multiples of %d, because further padding changes what this model computes, "
    "or that could not be found out: every other length is captured, which takes seconds, and batches of different "
    "lengths are padded to the longest of all ranks. Let the collator pad to few lengths, the same on all ranks"
)
_PAD = {
    "attention_mask": 0,
    "decoder_attention_mask": 0,
    "token_type_ids": 0,
    "labels": -100,
    "decoder_input_ids": None,
    "input_ids": None,
}
"""Padding by field; None stands for the model's pad token."""


@dataclass(frozen=True)
class GlobalBatch:
    """All ranks' samples in rank order, on this rank's device, and how they were divided."""

    fields: dict[str, Any]
    """Tensors of the global batch, and arguments that are not tensors. Those with several rows a sample are folded."""
    batched: frozenset[str]
    """Fields with samples in dimension 0."""
    shards: tuple[int, ...]
    """Samples of each rank."""
    unpadded: frozenset[str]
    """Attention masks that hide nothing: all ones on every rank, and not padded."""
    own_shapes: Mapping[str, tuple[int, ...]]
    """This rank's shape of a sample of each batched field, before padding."""
    folded: frozenset[str] = frozenset()
    """Fields that are (samples, rows, ...) here and (samples * rows, ...) for the model."""

    @property
    def samples(self) -> int:
        return sum(self.shards)

    @property
    def tokens(self) -> int:
        """Positions of the token ids, padding included; 0 where there are none."""
        ids = self.fields.get("input_ids")
        return ids.numel() if isinstance(ids, torch.Tensor) else 0

    @property
    def plain(self) -> tuple[tuple[str, str], ...]:
        """Arguments that are not tensors, by name, as words that can be compared."""
        return tuple(sorted(_plain(self.fields).items()))

    @property
    def surplus(self) -> dict[tuple[str, int], int]:
        """By how much padding made this rank's samples longer, by field and dimension, where it did."""
        return {
            (name, dim): common - own
            for name, shape in self.own_shapes.items()
            for dim, (own, common) in enumerate(zip(shape, self.fields[name].shape[1:]), start=1)
            if own != common
        }

    def first(self, rank: int) -> int:
        """Index of the first sample of `rank`."""
        return sum(self.shards[:rank])


Hides = Callable[[Mapping[str, Any], Mapping[str, float], Collection[str]], bool | None]
"""Whether the model gives the same for a batch with longer fields (`capture.padding.hides_padding`)."""


class Gatherer:
    """Puts the shards of all ranks together, padding fields to a common length.

    Lengths are rounded up to multiples of `length_multiple`, so that few graphs serve all, where `hides` finds that
    this changes nothing.
    """

    def __init__(
        self,
        transport: Transport,
        device: torch.device,
        pad: Mapping[str, float],
        length_multiple: int,
        pad_token: int | None,
        max_length: int | None,
        hides: Hides | None = None,
    ) -> None:
        self.transport, self.device, self.hides = transport, device, hides
        self._rounds: dict[tuple[str, ...], bool] = {}
        """By fields that would be longer, whether the model gives the same for longer ones."""
        self._shared: dict[str, bool] = {}
        """Fields of earlier batches, and whether they had one entry for all samples."""
        self.rules: dict[str, float | None] = {**_PAD, **pad}
        self.length_multiple, self.pad_token, self.max_length = length_multiple, pad_token, max_length

    def gather(self, batch: Mapping[str, Any], error: str | None = None, model: str = "") -> GlobalBatch:
        """The global batch. Collective; `error` is this rank's complaint about its own shard.

        model: what state the model is in, in words that must be the same on all ranks.

        Raises:
            ValueError: on every rank alike, when shards do not fit together; says which rank and field.
        """
        mine: Any = error
        if error is None:
            try:
                known = [name for name, shared in self._shared.items() if not shared]
                mine = {**_describe(batch, known), "model": model}
            except ValueError as problem:
                mine = str(problem)
        everyone = self.transport.all_gather_object(mine, "shapes of the batch")
        for rank, description in enumerate(everyone):
            if isinstance(description, str):
                raise ValueError(f"rank {rank}: {description}")
        _check_models([d["model"] for d in everyone])
        rows = _agreed_rows(everyone)
        batch = fold(batch, rows)
        shapes = self._common_shapes([d["tensors"] for d in everyone], rows)
        shapes = self._round_lengths(shapes, batch, rows)
        _check_shared(everyone, shapes)
        _check_plain([d["plain"] for d in everyone])
        shards = tuple(d["samples"] for d in everyone)
        fields: dict[str, Any] = {}
        batched = set()
        # Ranks may pass their fields in any order.
        for name, value in sorted(batch.items()):
            if not isinstance(value, torch.Tensor):
                fields[name] = value
                continue
            value = value.to(self.device)
            if value.is_inference():
                # Neither kept for a backward nor written to outside of inference mode.
                value = value.clone()
            if name not in shapes:
                fields[name] = value
                continue
            batched.add(name)
            fields[name] = self._gather_field(name, value, shapes[name], shards)
        own = {name: tuple(batch[name].shape[1:]) for name in batched}
        unpadded = frozenset(
            name
            for name in MASK_FIELDS
            if all(name in d["full"] and d["tensors"][name][0][1:] == shapes.get(name) for d in everyone)
        )
        return GlobalBatch(fields, frozenset(batched), shards, unpadded, own, frozenset(rows))

    def _gather_field(
        self, name: str, value: torch.Tensor, shape: tuple[int, ...], shards: tuple[int, ...]
    ) -> torch.Tensor:
        most = max(shards)
        if tuple(value.shape) != (most, *shape):
            whole = torch.full((most, *shape), self._value(name), dtype=value.dtype, device=self.device)
            whole[tuple(slice(0, n) for n in value.shape)] = value
            value = whole
        if self.transport.world_size == 1:
            return value
        parts = self.transport.all_gather(value.contiguous(), f"field {name} of the batch")
        return torch.cat([part[:n] for part, n in zip(parts, shards)])

    def _value(self, name: str) -> float:
        value = self.rules.get(name, 0)
        if value is None:
            return self.pad_token if self.pad_token is not None else 0
        return value

    def _common_shapes(
        self, descriptions: list[dict[str, Any]], folded: Collection[str] = ()
    ) -> dict[str, tuple[int, ...]]:
        """Shape of a sample of each batched field that all ranks pad to."""
        names = list(descriptions[0])
        for rank, other in enumerate(descriptions):
            if sorted(other) != sorted(names):
                raise ValueError(f"rank 0 passes the fields {sorted(names)}, rank {rank} passes {sorted(other)}")
        result = {}
        for name in names:
            specs = [d[name] for d in descriptions]
            if any(s[1] != specs[0][1] or len(s[0]) != len(specs[0][0]) for s in specs):
                raise ValueError(f"field '{name}' has different dtypes or dimensions on different ranks: {specs}")
            if self._have_samples(name, specs):
                sizes = [max(s[0][d] for s in specs) for d in range(1, len(specs[0][0]))]
                uneven = any(s[0][1:] != specs[0][0][1:] for s in specs)
                if uneven and name in folded:
                    raise ValueError(
                        f"field '{name}' has several rows a sample, of different sizes on different ranks "
                        f"({[s[0][1:] for s in specs]}): pad or cut them alike, in the data collator"
                    )
                if uneven:
                    self._check_can_pad(name, specs, "attention_mask" in names)
                result[name] = tuple(sizes)
        return result

    def _have_samples(self, name: str, specs: list[Any]) -> bool:
        """Whether a field has one entry a sample. A rank with one sample cannot tell that from one entry for all.

        Where every rank has one, it is as in earlier batches.
        """
        alone = all(shape[:1] in ((), (1,)) for shape, _, _ in specs)
        if all(has for _, _, has in specs):
            if alone:
                return not self._shared.get(name, False)
            self._shared[name] = False
            return True
        if alone:
            self._shared[name] = True
            return False
        raise ValueError(
            f"field '{name}' has one entry a sample on some ranks and not on others: its sizes are "
            f"{[tuple(shape) for shape, _, _ in specs]}"
        )

    def _round_lengths(
        self, shapes: dict[str, tuple[int, ...]], batch: Mapping[str, Any], folded: Collection[str]
    ) -> dict[str, tuple[int, ...]]:
        """Round the length of the attention mask up, and that of the fields as long as it: few graphs serve all.

        Only where a rule says what to pad each of these fields with, and where this changes nothing. Collective.
        """
        length = next(iter(shapes.get("attention_mask", ())), None)
        alike = [name for name, shape in shapes.items() if shape and shape[0] == length and name not in folded]
        if length is None or any(name not in self.rules for name in alike):
            return shapes
        rounded = self._rounded(length)
        if rounded == length or not self._hidden(batch, sorted(alike), folded):
            return shapes
        return {n: (rounded, *shape[1:]) if n in alike else shape for n, shape in shapes.items()}

    def _hidden(self, batch: Mapping[str, Any], names: list[str], folded: Collection[str]) -> bool:
        """Whether the model gives the same where fields are longer; rank 0 says so, once for the same fields."""
        if self.hides is None:
            return True
        hides, key = self.hides, tuple(names)
        if key not in self._rounds:
            padding = {name: self._value(name) for name in names}
            found = self.transport.from_rank_0(
                lambda: hides(batch, padding, folded), "whether padding changes what the model computes"
            )
            if found is None:
                return False
            self._rounds[key] = found
            if not found and self.transport.rank == 0:
                logger.warning(_NOT_HIDDEN, self.length_multiple)
        return self._rounds[key]

    def _rounded(self, length: int) -> int:
        rounded = -(-length // self.length_multiple) * self.length_multiple
        return min(rounded, self.max_length) if self.max_length is not None and self.max_length >= length else rounded

    def _check_can_pad(self, name: str, specs: list[Any], masked: bool) -> None:
        shapes = [tuple(s[0]) for s in specs]
        if name not in self.rules:
            raise ValueError(
                f"field '{name}' has different sizes on different ranks ({shapes}) and no rule says what to pad it "
                f"with: pad all batches alike, or set pad: {{{name}: VALUE}} in the rannc config"
            )
        if not masked:
            raise ValueError(
                f"field '{name}' has different sizes on different ranks ({shapes}), and without an attention_mask "
                "padding would change the result: pad all batches alike, or pass an attention_mask"
            )


def _first_unlike(told: Sequence[object]) -> int | None:
    """The first rank that tells something else than rank 0."""
    return next((rank for rank, other in enumerate(told) if other != told[0]), None)


def _check_models(told: Sequence[str]) -> None:
    """Every rank captures and runs its own copy of the model, in the state that the script has left it in."""
    rank = _first_unlike(told)
    if rank is not None:
        raise ValueError(
            f"the model is not in the same state on ranks 0 and {rank}: {told[0]} on rank 0, {told[rank]} on rank "
            f"{rank}; set its mode, attributes and hooks alike on every process"
        )


def _check_plain(told: Sequence[Mapping[str, str]]) -> None:
    rank = _first_unlike(told)
    if rank is not None:
        raise ValueError(f"ranks 0 and {rank} pass different arguments: {told[0]} and {told[rank]}")


def _agreed_rows(descriptions: list[dict[str, Any]]) -> dict[str, int]:
    """Rows a sample of the fields that have several, on all ranks alike. A rank without samples is told by the others.

    Its description is changed to what it would be.
    """
    known = next((r for r, d in enumerate(descriptions) if d["samples"]), 0)
    rows: dict[str, int] = descriptions[known]["rows"]
    for rank, other in enumerate(descriptions):
        if not other["samples"]:
            for name in rows.keys() & other["tensors"].keys():
                shape, dtype, has = other["tensors"][name]
                other["tensors"][name] = ((0, rows[name], *shape[1:]), dtype, has)
        elif other["rows"] != rows:
            raise ValueError(
                f"ranks {known} and {rank} have different numbers of rows a sample, {rows} and {other['rows']} (fields "
                "of one row left out): pad or cut them alike, in the data collator"
            )
    return rows


def _check_shared(descriptions: list[dict[str, Any]], batched: Collection[str]) -> None:
    """Raise ValueError where ranks pass other values in a field that all samples share."""
    for name in descriptions[0]["shared"]:
        rank = _first_unlike([d["shared"].get(name) for d in descriptions])
        if name not in batched and rank is not None:
            raise ValueError(
                f"field '{name}' has no samples, and ranks 0 and {rank} pass other values in it: all samples of "
                "the global batch share it. Pass the same on all ranks, or one entry a sample"
            )


def _plain(arguments: Mapping[str, Any]) -> dict[str, str]:
    return {name: repr(value) for name, value in arguments.items() if not isinstance(value, torch.Tensor)}


def digest(value: torch.Tensor) -> str:
    """What tells apart tensors with other values in them."""
    data = value.detach().cpu().contiguous().reshape(-1).view(torch.uint8)
    return hashlib.sha256(data.numpy().tobytes()).hexdigest()[:16]


def _describe(batch: Mapping[str, Any], of_samples: Collection[str] = ()) -> dict[str, Any]:
    """Shapes and dtypes of this rank's shard, folded, small enough to send to everyone.

    `of_samples`: fields known to have entries of each sample.
    """
    samples, rows = rows_of(batch, of_samples)
    batch = fold(batch, rows)
    tensors = {
        k: (tuple(v.shape), str(v.dtype), v.dim() > 0 and v.shape[0] == samples)
        for k, v in batch.items()
        if isinstance(v, torch.Tensor)
    }
    # A mask may hold other numbers than 0 and 1: those of the segments that tokens see.
    full = [k for k in MASK_FIELDS if k in tensors and bool((batch[k] == 1).all())]
    shared = {k: digest(batch[k]) for k, (shape, _, has) in tensors.items() if not has or shape[:1] == (1,)}
    return {
        "samples": samples,
        "rows": rows,
        "tensors": tensors,
        "full": full,
        "shared": shared,
        "plain": _plain(batch),
    }
