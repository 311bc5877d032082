"""The steps of one stage on the host: next batch, dispatch, metrics of the step before, save."""

import math
import time
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import jax
from absl import logging

from popi_jax import distributed
from popi_jax.arrays import Metrics, TrainState
from popi_jax.config import Config
from popi_jax.diagnostics.probe import Probe
from popi_jax.diagnostics.watch import Monitor
from popi_jax.metric_writer import MetricWriter
from popi_jax.models.layout import Rules
from popi_jax.progress import Progress
from popi_jax.sharding import place_batch

SHOWN = {
    "warmup/generator_nll": "generator nll",
    "warmup/summary_nll": "summary nll",
    "warmup/reading_nll": "reading nll",
    "generator/loss": "loss",
    "inference/reward": "reward",
    "inference/accuracy": "accuracy",
}  # metric -> its name beside the progress bar
PROBED = {
    "probe/nats_none": "nats of no summary",
    "probe/nats_summary": "of the summary",
    "probe/acc_summary": "accuracy",
    "probe/bits_other": "bits of another user's",
    "probe/information": "information",
}  # value of the probe -> its name in the log


Update = Callable[[TrainState, Any], tuple[TrainState, Metrics]]


class Stopped(Exception):
    """The run was asked to stop and has saved; the same command continues it."""

    def __init__(self, signal_number: int, step: int) -> None:
        super().__init__(
            f"stopped by signal {signal_number}; saved at step {step}: the same command continues"
        )
        self.signal_number = signal_number


class NotFinite(Exception):
    """A metric became infinite or not a number; nothing was saved after it."""


class Host(NamedTuple):
    """What the loop over the steps of a stage works with."""

    config: Config
    mesh: jax.sharding.Mesh
    rules: Rules
    batches: Iterator[Any]
    writer: MetricWriter
    stop: distributed.StopRequest
    save: Callable[[int, TrainState], None]
    monitor: Monitor | None = None  # None: nobody looks at the metrics
    probe: Probe | None = None  # None: nobody is looked at


def run_stage(
    host: Host, program: Update, state: TrainState, step: int, last_step: int, label: str
) -> tuple[int, TrainState]:
    """Runs one stage. Metrics of a step are read only after the next one is dispatched, so the
    device never waits."""
    schedule, stop = host.config.schedule, host.stop
    pending: list[tuple[int, Metrics]] = []
    if host.probe is not None and step == host.probe.first_step:
        look(host, step, state)
    tokens, since = 0.0, time.monotonic()
    batch, placed = place_next(host)
    logging.info("%s: compiling, then steps %d to %d", label, step + 1, last_step)
    with Progress(
        last_step, initial=step, label=label, enabled=distributed.is_main_process()
    ) as progress:
        while step < last_step:
            tokens += count_tokens(batch)
            state, metrics = program(state, placed)
            step += 1
            saving = step % schedule.save_every == 0 or step == last_step
            asks = saving or step % schedule.log_every == 0 or jax.process_count() == 1
            number = stop.agreed() if asks else 0
            pending.append((step, metrics))
            if host.probe is not None and host.probe.is_due(step, last_step):
                tokens += write_metrics(pending, host.writer, host.monitor).sampled_tokens
                pending = []
                since += look(host, step, state)
            if saving or number:
                tokens += write_metrics(pending, host.writer, host.monitor).sampled_tokens
                pending = []
                host.writer.flush()
                host.save(step, state)
                if number:
                    raise Stopped(number, step)
            elif len(pending) > schedule.log_every:
                written = write_metrics(pending[:-1], host.writer, host.monitor)
                pending = pending[-1:]
                tokens += written.sampled_tokens
                rate = {"tokens/s": tokens / max(time.monotonic() - since, 1e-9)}
                tokens, since = 0.0, time.monotonic()
                shown = {SHOWN[k]: value for k, value in written.means.items() if k in SHOWN}
                progress.update(step, shown | rate)
            else:
                progress.update(step)
            if step < last_step:
                batch, placed = place_next(host)
    return step, state


def look(host: Host, step: int, state: TrainState) -> float:
    """Adds what the probe finds to the line of a step, the last that was written; returns the
    seconds that it took."""
    jax.block_until_ready(state)  # so that the time is that of the look alone
    start = time.monotonic()
    if host.probe is not None:
        found = host.probe.measure(state)
        host.writer.add(step, found)
        if host.monitor is not None:
            host.monitor.see(step, found)
        shown = [f"{PROBED[k]} {value:.3f}" for k, value in found.items() if k in PROBED]
        took = time.monotonic() - start
        logging.info("Step %d, validation: %s (%.1f s)", step, ", ".join(shown), took)
    return time.monotonic() - start


def place_next(host: Host) -> tuple[Any, Any]:
    """The next batch on the host, and on the devices: its copy runs while the update before it
    does."""
    batch = next(host.batches)
    return batch, place_batch(batch, host.mesh, host.rules)


def count_tokens(batch: Any) -> int:
    """Tokens of data in the whole batch, padding left out."""
    leaves = jax.tree.leaves_with_path(batch)
    lengths = [x for path, x in leaves if "lengths" in jax.tree_util.keystr(path)]
    return int(sum(x.sum() for x in lengths)) * jax.process_count()


class Written(NamedTuple):
    means: dict[str, float]  # of metrics, over the steps where they apply
    sampled_tokens: float  # in all steps


def write_metrics(
    pending: list[tuple[int, Metrics]], writer: MetricWriter, monitor: Monitor | None = None
) -> Written:
    """Writes the metrics of some steps; the monitor warns of what they tell.

    Raises: NotFinite."""
    seen: dict[str, list[float]] = {}
    for step, metrics in jax.device_get(pending):
        values = {
            name: float(m.total) / float(m.weight)
            for name, m in metrics.items()
            if float(m.weight) > 0
        }
        bad = sorted(name for name, value in values.items() if not math.isfinite(value))
        if bad:
            raise NotFinite(
                f"step {step}: {', '.join(bad)} is not finite; lower the learning rate of that role"
            )
        writer.write(step, values)
        if monitor is not None:
            monitor.see(step, values)
        for name, value in values.items():
            seen.setdefault(name, []).append(value)
    means = {name: sum(values) / len(values) for name, values in seen.items()}
    return Written(means, sum(seen.get("sampled_tokens", [])))
