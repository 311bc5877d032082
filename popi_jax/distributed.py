"""One process or many: start-up, who writes, and how a request to stop reaches all of them."""

import os
import signal
from types import FrameType

import jax
import numpy as np
from jax.experimental import multihost_utils


def start() -> None:
    """Joins the other processes where the environment names a coordinator or a TPU pod; otherwise does nothing."""
    pod = os.environ.get("TPU_WORKER_HOSTNAMES", "").count(",") > 0
    if os.environ.get("JAX_COORDINATOR_ADDRESS") or pod:
        jax.distributed.initialize()


def is_main_process() -> bool:
    return jax.process_index() == 0


class StopRequest:
    """Remembers SIGINT and SIGTERM, so that a loop can save and end at a step that all processes agree on.

    A second signal of the same kind acts as it would without this.
    """

    def __init__(self) -> None:
        self.signal = 0
        self._previous = {s: signal.signal(s, self._remember) for s in (signal.SIGINT, signal.SIGTERM)}

    def _remember(self, number: int, frame: FrameType | None) -> None:
        del frame
        self.signal = number
        signal.signal(number, self._previous[signal.Signals(number)])

    def agreed(self) -> int:
        """The signal that any process received, 0 if none. Every process must call it at the same step."""
        if jax.process_count() == 1:
            return self.signal
        return int(np.max(multihost_utils.process_allgather(np.int32(self.signal))))

    def close(self) -> None:
        for number, handler in self._previous.items():
            signal.signal(number, handler)
