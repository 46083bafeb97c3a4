"""Schedules as data: what each stage does, in order."""

from __future__ import annotations

from rannc_hf.engine.schedule.actions import Action as Action
from rannc_hf.engine.schedule.actions import ActionKind as ActionKind
from rannc_hf.engine.schedule.lower import Edges as Edges
from rannc_hf.engine.schedule.lower import lower as lower
from rannc_hf.engine.schedule.lower import lower_backward as lower_backward
from rannc_hf.engine.schedule.lower import lower_forward as lower_forward
from rannc_hf.engine.schedule.registry import SCHEDULES as SCHEDULES
from rannc_hf.engine.schedule.registry import compute_order as compute_order
from rannc_hf.engine.schedule.registry import in_flight as in_flight
from rannc_hf.engine.schedule.validate import validate as validate
