"""Phases: consecutive fractions of a run, each with its own config.

`train.phases` is a text such as `0%: objective.mask_rate=0.3->0.15; 90%: data.seq_len=512, train.global_batch_size=64`:
where each phase begins, and which fields change there. `a->b` interpolates a number linearly from a to b over the
phase, and `->b` starts at the value before. Unmentioned fields keep their value, interpolated ones their last value. A
phase begins at a fraction of the run, so that the length of the run may be given in steps, tokens or time.

The learning rate warms up and follows its schedule over a cycle of phases: the whole run, unless a phase sets
`optimizer.warmup_steps` or `optimizer.warmup_fraction`, with which another cycle begins.
"""

import dataclasses
import itertools
import re
from collections.abc import Mapping, Sequence
from types import MappingProxyType
from typing import Any, NamedTuple

from flax_mlm.config import validate
from flax_mlm.config.knobs import knob, knobs, parse, value_of
from flax_mlm.config.schema import INTERPOLATED, Config, split
from flax_mlm.errors import UserError, as_user_error

_FIXED_WITH_RTD = ("name", "generator_size", "generator_depth", "embedding_sharing")  # parameters depend on them
_NUMBER = r"\d+(?:_?\d)*(?:\.\d+)?(?:e[+-]?\d+)?"


class Cycle(NamedTuple):
    """Phases over which the learning rate follows its schedule."""

    begin: float = 0.0  # as a fraction of the run
    end: float = 1.0
    first_step: int = 0
    num_steps: int | None = None  # None: the run ends by time


class Phase(NamedTuple):
    """One phase of a run."""

    config: Config  # with the first values of interpolated fields
    begin: float = 0.0  # as a fraction of the run
    end: float = 1.0
    final_values: Mapping[str, float] = MappingProxyType({})  # interpolated field -> value at the end of the phase
    changes: str = ""  # as the user wrote them
    first_step: int = 0
    num_steps: int | None = None  # None: the run ends by time
    cycle: Cycle = Cycle()

    def value(self, path: str, progress: Any) -> Any:
        """The value of a field after this fraction of the phase, a float or an array."""
        first = value_of(self.config, path)
        return first + progress * (self.final_values[path] - first) if path in self.final_values else first

    def with_rows(self, seq_len: int, tokens_per_row: float) -> "Phase":
        """The phase with the rows of its corpus and, if the run's length is in tokens, its number of steps.

        Args:
          seq_len: L.
          tokens_per_row: mean tokens of a row, special tokens not counted.
        """
        t, config = self.config.train, _with_values(self.config, {"data.seq_len": seq_len})
        if t.unit != "tokens":
            return self._replace(config=config)
        steps = (self.end - self.begin) * t.tokens / (t.global_batch_size * tokens_per_row)
        return self._replace(config=config, num_steps=max(1, round(steps)))

    @property
    def largest_mask_rate(self) -> float:
        """The mask rate that the number of prediction slots K is sized for."""
        return max(self.config.objective.mask_rate, self.final_values.get("objective.mask_rate", 0.0))


def single_phase(config: Config) -> Phase:
    """The only phase of a run whose config does not change."""
    num_steps = config.train.steps if config.train.unit == "steps" else None
    return Phase(config, num_steps=num_steps, cycle=Cycle(num_steps=num_steps))


def parse_phases(config: Config) -> list[Phase]:
    """The phases of a run, in order; with their steps if the run's length is in steps.

    Raises:
      UserError: `train.phases` cannot be parsed, or a change is not possible.
    """
    length, unit = config.train.length, config.train.unit
    phases = [Phase(_with_values(config, {"train.phases": ""}))]
    for text in filter(None, split(config.train.phases, ";")):
        begin, changes = _parse_statement(text, length, unit)
        is_first = begin == 0.0 and len(phases) == 1 and not phases[0].changes
        if not is_first and not phases[-1].begin < begin < 1:
            if unit == "steps":
                at = f"step {begin * length:g}; expected one between steps {phases[-1].begin * length:g} and {length}"
            else:
                at = f"{begin:.1%}; expected between {phases[-1].begin:.1%} and 100.0%"
            raise _error(f"'{text}' begins at {at}")
        before = phases.pop()
        if not is_first:
            phases.append(before._replace(end=begin))
        phases.append(_next_phase(before, begin, changes))
    _check_schedule_free(config, phases)
    if unit == "steps":
        steps = [round(p.begin * length) for p in phases] + [int(length)]
        phases = [
            p._replace(first_step=a, num_steps=b - a)
            for p, (a, b) in zip(phases, itertools.pairwise(steps), strict=True)
        ]
    return _with_cycles(phases)


def _parse_statement(text: str, length: float, unit: str) -> tuple[float, str]:
    """Parses `FROM: changes`. Returns the fraction of the run where the phase begins, and the changes."""
    match = re.fullmatch(rf"({_NUMBER})(%?)\s*:(.+)", text, re.S)
    if not match:
        example = "'0%: objective.mask_rate=0.3->0.15; 50%: objective.name=clm'"
        raise _error(f"cannot parse '{text}'; expected FROM: field=value, field=a->b; FROM: ... such as {example}")
    begin = float(match[1]) / (100 if match[2] else length)
    if unit == "steps" and begin < 1:
        begin = round(begin * length) / length
    return begin, match[3].strip()


def _parse_changes(text: str) -> dict[str, tuple[str | None, str | None]]:
    """Parses `field=first, field->final, field=first->final, ...`: field -> first and final value as written."""
    items: list[str] = []
    for item in split(text, ","):
        if "=" in item or "->" in item or not items:
            items.append(item)
        else:  # the comma belongs to a value, such as several corpora
            items[-1] += f",{item}"
    changes: dict[str, tuple[str | None, str | None]] = {}
    for item in items:
        match = re.fullmatch(r"([^=>]*?)\s*(?:=(.*?))?(?:->(.*))?", item, re.S)
        if not match or (match[2] is None and match[3] is None):
            raise _error(f"cannot parse '{item}'; expected field=value or field=a->b")
        path, first, final = match.groups()
        if path in changes:
            raise _error(f"'{text}' changes {path} twice")
        changes[path] = first and first.strip(), final and final.strip()
    return changes


def _next_phase(before: Phase, begin: float, text: str) -> Phase:
    """The phase that changes what `text` says in the phase before."""
    config, final_values = _with_values(before.config, before.final_values), dict[str, float]()
    changes = _parse_changes(text)
    for path, (first, final) in changes.items():
        if not knob(path).in_phases:
            raise _error(f"'{path}' cannot change within a run")
        if first is not None:
            config = _with_values(config, {path: parse(path, first)})
        if final is not None:
            if knob(path).in_phases != INTERPOLATED:
                can = ", ".join(name for name, other in knobs().items() if other.in_phases == INTERPOLATED)
                raise _error(f"'{path}' cannot be interpolated with '->'; these can: {can}")
            final_values[path] = parse(path, final)
    if config.data.corpus and "data.seq_len" in changes:
        raise _error("data.seq_len comes from data.corpus; name a corpus prepared with that data.seq_len")
    _check_phase(before, begin, config, final_values, text)
    return Phase(config, begin, 1.0, final_values, text)


def _check_phase(before: Phase, begin: float, config: Config, final_values: Mapping[str, float], text: str) -> None:
    """Raises UserError if the first or the last config of a phase is not valid."""
    # A learning rate may end at 0, but not begin there.
    final = {path: value for path, value in final_values.items() if (path, value) != ("optimizer.learning_rate", 0.0)}
    for changed in (config, _with_values(config, final)):
        with as_user_error(f"train.phases: '{text}': ", UserError):
            validate.check(changed)
    for name in _FIXED_WITH_RTD:
        old, new = getattr(before.config.objective, name), getattr(config.objective, name)
        if begin > 0 and "rtd" in (before.config.objective.name, config.objective.name) and old != new:
            change = f"'{text}' changes objective.{name} from {old} to {new}"
            raise _error(f"{change}, but the parameters of rtd depend on it")


def _check_schedule_free(config: Config, phases: Sequence[Phase]) -> None:
    """Raises UserError if a phase changes what schedule-free's average depends on: the learning rate after warm-up, and
    the number of steps."""
    if config.optimizer.name != "schedule_free":
        return
    fixed = ["optimizer.learning_rate", "optimizer.warmup_steps", "optimizer.warmup_fraction"]
    if config.train.unit == "tokens":
        fixed += ["train.global_batch_size", "data.seq_len", "data.corpus", "data.sampling_alpha"]
    for path, p in itertools.product(fixed, phases):
        if path in p.final_values or value_of(p.config, path) != value_of(config, path):
            raise _error(f"'{p.changes}' changes {path}, which must stay the same with optimizer.name=schedule_free")


def with_corpora(phases: Sequence[Phase], seq_len: Sequence[int], tokens_per_row: Sequence[float]) -> list[Phase]:
    """The phases with the rows of their corpora and, if the run's length is in tokens, with their steps.

    Args:
      seq_len: L of each phase's rows.
      tokens_per_row: mean tokens of each phase's rows, special tokens not counted.

    Raises:
      UserError: the run has too few steps for `optimizer.averaging`, or too many for a 32-bit number.
    """
    phases = [p.with_rows(n, tokens) for p, n, tokens in zip(phases, seq_len, tokens_per_row, strict=True)]
    if phases[0].config.train.unit != "tokens":
        return phases
    counts = [p.num_steps or 0 for p in phases]
    if sum(counts) >= 2**31:
        t = phases[0].config.train
        what = f"train.tokens is {t.tokens:g}, which is {sum(counts):.3g} steps of train.global_batch_size rows"
        raise UserError(f"{what}; expected less than 2**31 steps; lower train.tokens")
    validate.check_snapshots(phases[0].config.optimizer, sum(counts))
    steps = {"train.steps": sum(counts)}
    configs = [_with_values(p.config, steps) for p in phases]
    firsts = itertools.accumulate(counts[:-1], initial=0)
    return _with_cycles(
        [p._replace(config=c, first_step=first) for p, c, first in zip(phases, configs, firsts, strict=True)]
    )


def _with_cycles(phases: Sequence[Phase]) -> list[Phase]:
    """The phases with their cycles. Raises UserError where the warm-up of one does not fit into it."""
    fields = {"optimizer.warmup_steps", "optimizer.warmup_fraction"}
    starts = [i for i, p in enumerate(phases) if i == 0 or fields & _parse_changes(p.changes).keys()]
    result: list[Phase] = []
    for start, end in itertools.pairwise([*starts, len(phases)]):
        members = phases[start:end]
        steps = None if members[0].num_steps is None else sum(p.num_steps or 0 for p in members)
        cycle = Cycle(members[0].begin, members[-1].end, members[0].first_step, steps)
        _check_warmup(members[0].config, cycle)
        result += [p._replace(cycle=cycle) for p in members]
    return result


def _check_warmup(config: Config, cycle: Cycle) -> None:
    """Raises UserError if the steps of a warm-up are too many, or not known."""
    o = config.optimizer
    if o.warmup_steps and config.train.unit == "budget_minutes" and cycle.begin > 0:
        raise _error("a phase of a run in minutes warms up by optimizer.warmup_fraction; set optimizer.warmup_steps=0")
    decay = o.decay_fraction if o.schedule == "wsd" else 0.0
    if cycle.num_steps is not None and o.warmup_steps > (most := round((1.0 - decay) * cycle.num_steps)):
        before = "the steps before the decay" if decay else "the steps of its schedule"
        raise UserError(f"optimizer.warmup_steps is {o.warmup_steps}; expected at most {most}, {before}")


def begins_as_written(config: Config) -> list[str]:
    """Where the phases of a config begin, as the user wrote it, such as `50%` or `300`."""
    return [text.partition(":")[0].strip() for text in filter(None, split(config.train.phases, ";"))]


def in_fractions(phases: Sequence[Phase]) -> str:
    """`train.phases` with percentages, for a run of any length."""
    return "; ".join(f"{100 * p.begin:g}%: {p.changes}" for p in phases if p.changes)


def index_at(phases: Sequence[Phase], step: int, progress: float) -> int:
    """The index of the phase of update number `step`, counted from 0, at this fraction of the run."""
    begun = [i for i, p in enumerate(phases) if (p.begin <= progress if p.num_steps is None else p.first_step <= step)]
    return begun[-1]


def is_over(phases: Sequence[Phase], step: int, progress: float) -> bool:
    """True if the run is done after this many updates, at this fraction of the run."""
    last = phases[-1]
    return progress >= 1.0 if last.num_steps is None else step >= last.first_step + last.num_steps


def _with_values(config: Config, values: Mapping[str, Any]) -> Config:
    """The config with some fields, given by dotted names, set to other values."""
    for path, value in values.items():
        section, _, name = path.rpartition(".")
        if value_of(config, path) != value:
            changed = dataclasses.replace(getattr(config, section), **{name: value})
            config = dataclasses.replace(config, **{section: changed})
    return config


def _error(why: str) -> UserError:
    return UserError(f"train.phases: {why}")
