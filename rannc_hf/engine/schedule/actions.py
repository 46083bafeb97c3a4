"""`Action`: one thing a stage does in a step. A schedule is, for each stage, a list of them."""

from __future__ import annotations

import enum
import re
from typing import NamedTuple


class ActionKind(enum.Enum):
    """What is done; the value is the code used in print."""

    RECV_ACT = "RA"
    FORWARD = "F"
    SEND_ACT = "SA"
    RECV_GRAD = "RG"
    BACKWARD = "B"
    SEND_GRAD = "SG"
    REDUCE_GRAD = "REDUCE"

    @property
    def is_receive(self) -> bool:
        return self in (ActionKind.RECV_ACT, ActionKind.RECV_GRAD)

    @property
    def is_send(self) -> bool:
        return self in (ActionKind.SEND_ACT, ActionKind.SEND_GRAD)

    @property
    def is_compute(self) -> bool:
        return self in (ActionKind.FORWARD, ActionKind.BACKWARD)


_PATTERN = re.compile(r"(\d+)(?:(REDUCE)|([FB])(\d+)|(R[AG])(\d+)<(\d+)|(S[AG])(\d+)>(\d+))")


class Action(NamedTuple):
    """Action `kind` of `stage` for `microbatch`; `peer` is the other stage of a send or a receive.

    Receives and sends are posted and do not wait; a forward or backward waits for the receives of its microbatch.
    Prints compactly: `2F0` (stage 2, forward of microbatch 0), `2B0`, `2RA0<1` (receive the activations of
    microbatch 0 from stage 1), `2SA0>3`, `2RG0<3` (receive gradients), `2SG0>1`, `2REDUCE`.
    """

    kind: ActionKind
    stage: int
    microbatch: int = -1
    peer: int = -1

    def __str__(self) -> str:
        text = f"{self.stage}{self.kind.value}"
        if self.kind is ActionKind.REDUCE_GRAD:
            return text
        text += str(self.microbatch)
        if self.kind.is_compute:
            return text
        return f"{text}{'<' if self.kind.is_receive else '>'}{self.peer}"

    @classmethod
    def parse(cls, text: str) -> Action:
        """The action that prints as `text`. Raises `ValueError` where there is none."""
        match = _PATTERN.fullmatch(text)
        if match is None:
            raise ValueError(f"{text!r} is not an action; actions look like 2F0, 2B0, 2RA0<1, 2SA0>3, 2RG0<3, 2REDUCE")
        stage, kind, *numbers = [group for group in match.groups() if group is not None]
        return cls(ActionKind(kind), int(stage), *map(int, numbers))
