"""A longer run: whether one that goes on with another length has the past of one that was as long from the start."""

import math
from collections.abc import Callable
from typing import Any, NamedTuple

import numpy as np

from flax_mlm.config import phases
from flax_mlm.config.phases import Phase
from flax_mlm.config.schema import LENGTHS, Config

# Fields that may change together with the length, where the past stays the same.
FIELDS = (
    *("train.steps", *(f"train.{name}" for name in LENGTHS), "train.phases"),
    *("optimizer.warmup_fraction", "optimizer.warmup_steps", "optimizer.decay_fraction"),
)

Layout = Callable[[Config], list[Phase]]  # the phases of a config, with the steps that its corpora give


class Done(NamedTuple):
    """Position of a run."""

    step: int = 0
    progress: float = 0.0  # as a fraction of the length that it had


def why_not(old: Config, new: Config, done: Done, layout: Layout) -> str:
    """Why a run cannot go on with another length; empty if it can.

    Args:
      old: config that it was trained with.
      new: the same, except for `FIELDS`.
    """
    unit = new.train.unit
    if old.train.unit != unit or new.train.length <= old.train.length:
        return f"what may change is its length, train.{old.train.unit}, which can be raised"
    for text in phases.begins_as_written(new):
        if text.endswith("%") and float(text[:-1]):
            return f"train.phases has a phase from {text} on, which would move; write where it begins in {unit}"
    before, after = layout(old), layout(new)
    if reason := _why_other_phases(before, after, done):
        return reason
    o, added = new.optimizer, sum((p.num_steps or 0) * sign for some, sign in ((after, 1), (before, -1)) for p in some)
    if o.averaging == "lawa" and added % (period := o.lawa_every * o.lawa_count):
        by = f"a multiple of optimizer.lawa_every × optimizer.lawa_count = {period}, not {added}"
        return f"optimizer.averaging=lawa counts its snapshots from the end; raise the length by {by} steps"
    for p, q in zip(_begun(before, done), after, strict=False):
        if (at := _last_other_rate(p, q, done)) is not None:
            return _cause(p, q, at, new)
    return ""


def _minutes_or_step(phase: Phase, progress: float, step: int) -> float:
    """A place in a run: its step, or the minute where time ends the run."""
    return round(progress * phase.config.train.length, 6) if phase.num_steps is None else step


def _begin(phase: Phase) -> float:
    return _minutes_or_step(phase, phase.begin, phase.first_step)


def _end(phase: Phase) -> float:
    return _minutes_or_step(phase, phase.end, phase.first_step + (phase.num_steps or 0))


def _position(phase: Phase, done: Done) -> float:
    return _minutes_or_step(phase, done.progress, done.step)


def _begun(before: list[Phase], done: Done) -> list[Phase]:
    return [p for p in before if _begin(p) < _position(p, done)]


def _why_other_phases(before: list[Phase], after: list[Phase], done: Done) -> str:
    """Why the phases that have begun would have been others; empty if they would not."""
    begun = _begun(before, done)
    for i, p in enumerate(begun):
        what, end = f"the phase '{p.changes}'" if p.changes else "the first phase", _end(p)
        q = after[i] if i < len(after) else None
        if q is None or q.changes != p.changes or _begin(q) != _begin(p):
            return f"train.phases has another phase instead of {what}, which has begun"
        if (p is not begun[-1] and _end(q) != end) or _end(q) < min(end, _position(p, done)):
            return f"train.phases ends {what} before it has ended; let the next one begin at {end:g}"
        if p.final_values and _end(q) != end:
            return f"train.phases: {what} changes a value until its end, {end:g}; begin another one there"
    return ""


def _last_other_rate(p: Phase, q: Phase, done: Done) -> float | None:
    """The last step (or minute) of a phase, among those done, with another learning rate in the longer run."""
    last = min(_end(p), _position(p, done))
    at = np.linspace(_begin(p), last, 10_000) if p.num_steps is None else np.arange(_begin(p), last)
    different = at[~np.isclose(_rates(p, at), _rates(q, at), rtol=1e-6, atol=0.0)]
    return float(different[-1]) if different.size else None


def _rates(phase: Phase, at: np.ndarray) -> np.ndarray:
    """Learning rates at steps or minutes of a phase, for a peak of 1."""
    # Heavy, and not needed by all who import this.
    import jax

    from flax_mlm.distributed.mesh import use_mesh
    from flax_mlm.training.update import schedule

    mesh = jax.make_mesh((1,), ("data",), devices=jax.local_devices()[:1])  # the other processes take no part
    with use_mesh(mesh):
        if phase.num_steps:
            return np.asarray(schedule(phase, at.astype(np.int32), None, None))
        progress = (at / phase.config.train.length).astype(np.float32)
        return np.asarray(schedule(phase, np.int32(2**30), progress, progress))


def _cause(p: Phase, q: Phase, at: float, new: Config) -> str:
    """The setting of a phase by which the learning rate at a step or minute depends on the length, and what to do."""
    o, (begin, end, first_step, steps) = p.config.optimizer, p.cycle
    length = p.config.train.length
    start = begin * length if steps is None else first_step
    span, span_now = (c.num_steps or (c.end - c.begin) * x.config.train.length for x in (p, q) for c in [x.cycle])
    warmup = o.warmup_fraction * span
    if not o.warmup_steps and at < start + o.warmup_fraction * max(span, span_now):
        keep = f"warmup_fraction={warmup / span_now:.9g}"
        if steps and math.isclose(warmup, round(warmup), rel_tol=1e-6):
            keep = f"warmup_steps={warmup:.0f}"
        what = f"optimizer.warmup_fraction={o.warmup_fraction:g} is a fraction of the length"
        return f"{what}; set optimizer.{keep} for the warm-up that it had"
    what = f"optimizer.schedule={o.schedule} decays from the warm-up on"
    if o.schedule == "wsd":
        what = f"optimizer.schedule=wsd has decayed since {'minute' if steps is None else 'step'}"
        what += f" {start + (1.0 - o.decay_fraction) * span:g}"
    again = "warmup_fraction=0.05" if steps is None else f"warmup_steps={max(1, round(0.05 * span))}"
    text = f"{new.train.phases}; " * bool(new.train.phases) + f"{end * length:.12g}: optimizer.{again}"
    return f"{what}; let a phase after it warm up again: --config.train.phases='{text}'"


def progress_now(meta: dict[str, Any], progress: float, config: Config, run_phases: list[Phase]) -> float:
    """Fraction of a run that is done at a checkpoint, also where the run was shorter then.

    Args:
      meta: of the checkpoint.
      progress: fraction of the run as it was.
    """
    stored, step = meta["config"]["train"], meta["step"]
    had = next((stored[name] for name in LENGTHS if stored[name]), stored["steps"])
    if had == config.train.length:
        return progress
    p = run_phases[phases.index_at(run_phases, step, progress)]
    if p.num_steps is None:
        return progress * had / config.train.length
    return p.begin + (p.end - p.begin) * (step - p.first_step) / p.num_steps
