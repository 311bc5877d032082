"""Shows how far a run is: a bar on a terminal, plain lines now and then in a pipe or a log file."""

import sys
import time
from collections.abc import Mapping
from typing import Any

from tqdm import tqdm


class Progress:
    """Counts steps from `initial` to `total` (0: unknown) and shows rate, time left and the newest
    metrics.

    `stream` is a text file, by default stderr. When it is no terminal, a line is printed at most
    every `interval` seconds, and one at the end."""

    def __init__(
        self,
        total: int,
        *,
        initial: int = 0,
        label: str = "",
        unit: str = "steps",
        enabled: bool = True,
        interval: float = 30.0,
        stream: Any = None,
    ) -> None:
        self._total, self._initial, self._step = total, initial, initial
        self._label, self._unit, self._interval = label, unit, interval
        self._stream = stream or sys.stderr
        self._enabled = enabled
        self._start = self._printed = time.monotonic()
        self._shown = initial
        self._metrics = ""
        self._bar: Any = None
        self._is_terminal = enabled and self._stream.isatty()
        self._started = False

    def update(self, step: int, metrics: Mapping[str, float] | None = None) -> None:
        """Sets the number of finished steps and, where given, the metrics to show."""
        if not self._enabled:
            return
        if metrics:
            self._metrics = ", ".join(
                f"{name} {format_number(value)}" for name, value in metrics.items()
            )
        previous, self._step = self._step, step
        if not self._started:  # the first step compiles: time counts from its end
            self._started, self._start, self._initial, previous = True, time.monotonic(), step, step
            if self._is_terminal:
                options = {"file": self._stream, "dynamic_ncols": True}
                options |= {"desc": self._label, "unit": f" {self._unit}"}
                self._bar = tqdm(total=self._total or None, initial=step, **options)
        if self._bar is not None:
            self._bar.set_postfix_str(self._metrics, refresh=False)
            self._bar.update(step - previous)
        elif time.monotonic() - self._printed >= self._interval:
            self._print_line()

    def close(self) -> None:
        if self._bar is not None:
            self._bar.close()
            self._bar = None
        elif self._enabled and self._step > self._shown:
            self._print_line()

    def __enter__(self) -> "Progress":
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def _print_line(self) -> None:
        now = time.monotonic()
        rate = (self._step - self._initial) / max(now - self._start, 1e-9)
        left = tqdm.format_interval((self._total - self._step) / rate) if rate > 0 else "?"
        known = self._total > 0
        parts = [
            f"{self._label} {self._step}{f'/{self._total}' if known else ''}".strip(),
            f"{rate:.3g} {self._unit}/s",
            f"{left} left" if known else "",
            self._metrics,
        ]
        print(", ".join(part for part in parts if part), file=self._stream, flush=True)
        self._printed, self._shown = now, self._step


def format_number(value: float) -> str:
    """Three significant digits, thousands as k and millions as M: 0.693, 12.3k."""
    for factor, unit in ((1e9, "G"), (1e6, "M"), (1e3, "k")):
        if abs(value) >= factor:
            return f"{value / factor:.3g}{unit}"
    return f"{value:.3g}"
