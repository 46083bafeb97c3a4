"""How ranks exchange tensors: real processes (`DistributedTransport`) or threads of one process (`LocalWorld`)."""

from __future__ import annotations

from rannc_hf.engine.transport.base import BACKWARD as BACKWARD
from rannc_hf.engine.transport.base import FORWARD as FORWARD
from rannc_hf.engine.transport.base import Channel as Channel
from rannc_hf.engine.transport.base import DeadlockError as DeadlockError
from rannc_hf.engine.transport.base import Pending as Pending
from rannc_hf.engine.transport.base import Transport as Transport
from rannc_hf.engine.transport.base import TransportError as TransportError
from rannc_hf.engine.transport.distributed import DistributedTransport as DistributedTransport
from rannc_hf.engine.transport.local import LocalWorld as LocalWorld
