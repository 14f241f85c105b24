"""The parts of a run, each with a config of its own, and what moves within it.

`train.phases` is a text such as `0%: objective.mask_rate=0.3->0.15; 90%: data.seq_len=512, train.global_batch_size=64`:
from where on, and which fields change there. `a->b` moves a number evenly from a to b in the course of its phase, `->b`
from what it was. What is not mentioned stays as it was, a number that has moved as it was in the end. A part is known
by its share of the run, so that it does not matter whether a run's length is given in steps, tokens or time.
"""

import dataclasses
import itertools
import re
from collections.abc import Mapping, Sequence
from types import MappingProxyType
from typing import Any, NamedTuple

from flax_mlm.config import validate
from flax_mlm.config.schema import Config, field_types, parse, value_of
from flax_mlm.errors import UserError

MOVING = (
    *("objective.mask_rate", "objective.mask_replace_prob", "objective.random_replace_prob"),
    *("optimizer.learning_rate", "optimizer.weight_decay"),
)
_CHANGING = (
    *MOVING,
    "objective.",
    *("train.global_batch_size", "train.gradient_accumulation_steps", "data.corpus", "data.seq_len"),
    *("model.rope_theta_global", "model.rope_theta_local", "model.sliding_window"),
    *("model.dropout_rate", "model.attention_dropout_rate", "model.attention", "model.remat"),
)
_FIXED_WITH_RTD = ("name", "generator_size", "generator_depth", "embedding_sharing")
_NUMBER = r"\d+(?:_?\d)*(?:\.\d+)?(?:e[+-]?\d+)?"


class Phase(NamedTuple):
    """One part of a run."""

    config: Config  # of what moves it has the first value
    begin: float = 0.0  # as a share of the run
    end: float = 1.0
    last: Mapping[str, float] = MappingProxyType({})  # of what moves: field -> its value at the end
    changes: str = ""  # as the user wrote them
    first_step: int = 0
    num_steps: int | None = None  # None: the clock decides

    def value(self, path: str, share: Any) -> Any:
        """A number of the config after this share of the phase (a float, or an array)."""
        first = value_of(self.config, path)
        return first + share * (self.last[path] - first) if path in self.last else first

    def of_rows(self, seq_len: int, tokens_per_row: float) -> "Phase":
        """With the rows that it has, now that its text is known, and of a run in tokens the steps.

        Args:
          seq_len: L.
          tokens_per_row: without special ones.
        """
        t, config = self.config.train, _with(self.config, {"data.seq_len": seq_len})
        if t.unit != "tokens":
            return self._replace(config=config)
        steps = (self.end - self.begin) * t.tokens / (t.global_batch_size * tokens_per_row)
        return self._replace(config=config, num_steps=max(1, round(steps)))

    @property
    def largest_mask_rate(self) -> float:
        """The number of predicted slots K is sized for it."""
        return max(self.config.objective.mask_rate, self.last.get("objective.mask_rate", 0.0))


def whole(config: Config) -> Phase:
    """A run that is all of one part."""
    return Phase(config, num_steps=config.train.steps if config.train.unit == "steps" else None)


def parse_phases(config: Config) -> list[Phase]:
    """The parts of a run, in order; of one whose length is in steps, also which steps each has.

    Raises:
      UserError: `train.phases` cannot be read, or asks for what cannot be.
    """
    length, unit = config.train.length, config.train.unit
    first = dataclasses.replace(config, train=dataclasses.replace(config.train, phases=""))
    found = [Phase(first)]
    for part in filter(None, map(str.strip, config.train.phases.split(";"))):
        match = re.fullmatch(rf"({_NUMBER})(%?)\s*:(.+)", part, re.S)
        if not match:
            raise _wrong(f"'{part}' is not a phase")
        begin = float(match[1]) / (100 if match[2] else length)
        if unit == "steps" and begin < 1:
            begin = round(begin * length) / length
        is_first = begin == 0.0 and len(found) == 1 and not found[0].changes
        if not is_first and not found[-1].begin < begin < 1:
            if unit == "steps":
                after = f"step {begin * length:g}, not between steps {found[-1].begin * length:g} and {length}"
            else:
                after = f"{begin:.1%}, not between {found[-1].begin:.1%} and 100.0%"
            raise _wrong(f"'{part}' begins at {after}")
        before = found.pop()
        if not is_first:
            found.append(before._replace(end=begin))
        found.append(_changed(before, begin, match[3].strip()))
    _check_average(config, found)
    if unit != "steps":
        return found
    return [p._replace(first_step=round(p.begin * length), num_steps=round((p.end - p.begin) * length)) for p in found]


def _changed(before: Phase, begin: float, changes: str) -> Phase:
    """The phase after another one, or in place of the first."""
    types, config = field_types(), _with(before.config, before.last)
    last, parts, named = dict[str, float](), list[str](), set[str]()
    for part in changes.split(","):
        if "=" in part or "->" in part or not parts:
            parts.append(part)
        else:  # a comma in a value, which names several corpora
            parts[-1] += f",{part}"
    for part in parts:
        match = re.fullmatch(r"([^=>]*?)\s*(?:=(.*?))?(?:->(.*))?", part.strip(), re.S)
        if not match or (match[2] is None and match[3] is None):
            raise _wrong(f"'{part.strip()}' is not a change")
        path, *texts = (text.strip() if text is not None else None for text in match.groups())
        assert path is not None
        if path not in types or not path.startswith(_CHANGING):
            raise _wrong(f"'{path}' cannot change within a run")
        if path in named:
            raise _wrong(f"'{changes}' changes {path} twice")
        named.add(path)
        first, final = (None if text is None else parse(types[path][0], path, text) for text in texts)
        if first is not None:
            config = _with(config, {path: first})
        if final is not None:
            if path not in MOVING:
                raise _wrong(f"'{path}' does not move; of what changes, {', '.join(MOVING)} do")
            last[path] = final
    if "data.seq_len" in named and config.data.corpus:
        raise _wrong("'data.seq_len' is that of data.corpus; name a corpus that was prepared with other rows")
    # A rate may end at 0, but not begin there.
    moved = {path: value for path, value in last.items() if (path, value) != ("optimizer.learning_rate", 0.0)}
    for changed in (config, _with(config, moved)):
        try:
            validate.check(changed)
        except UserError as e:
            raise UserError(f"train.phases: '{changes}': {e}") from e
    for name in _FIXED_WITH_RTD:
        old, new = (getattr(c.objective, name) for c in (before.config, config))
        if begin > 0 and "rtd" in (before.config.objective.name, config.objective.name) and old != new:
            why = "with rtd the parameters depend on it"
            raise _wrong(f"'{changes}' changes objective.{name} from {old} to {new}, but {why}")
    return Phase(config, begin, 1.0, last, changes)


def _check_average(config: Config, found: Sequence[Phase]) -> None:
    """Schedule-free's average goes by the number of steps and by a rate that only the warm-up changes."""
    if config.optimizer.name != "schedule_free":
        return
    fixed = ["optimizer.learning_rate"]
    if config.train.unit == "tokens":
        fixed += ["train.global_batch_size", "data.seq_len", "data.corpus"]
    for path, phase in itertools.product(fixed, found):
        if path in phase.last or value_of(phase.config, path) != value_of(config, path):
            raise _wrong(
                f"'{phase.changes}' changes {path}, which optimizer.name = 'schedule_free' needs the same throughout"
            )


def settled(phases: Sequence[Phase], seq_len: Sequence[int], tokens_per_row: Sequence[float]) -> list[Phase]:
    """The phases, now that the corpus of each is known: with its rows, and where a run's length is in tokens with the
    steps that each has.

    Args:
      seq_len: L of each phase's rows.
      tokens_per_row: of each phase's rows, without special ones.

    Raises:
      UserError: the run has too few steps for the average that is asked for.
    """
    phases = [p.of_rows(n, each) for p, n, each in zip(phases, seq_len, tokens_per_row, strict=True)]
    if phases[0].config.train.unit != "tokens":
        return phases
    counts = [p.num_steps or 0 for p in phases]
    validate.check_snapshots(phases[0].config.optimizer, sum(counts))
    return [
        p._replace(config=_with(p.config, {"train.steps": sum(counts)}), first_step=sum(counts[:i]))
        for i, p in enumerate(phases)
    ]


def in_shares(phases: Sequence[Phase]) -> str:
    """`train.phases`, for a run of any length."""
    return "; ".join(f"{100 * p.begin:g}%: {p.changes}" for p in phases if p.changes)


def number(phases: Sequence[Phase], step: int, progress: float) -> int:
    """The number of the phase that update number `step`, from 0, belongs to, at this share of the run."""
    begun = [i for i, p in enumerate(phases) if (p.begin <= progress if p.num_steps is None else p.first_step <= step)]
    return begun[-1]


def is_over(phases: Sequence[Phase], step: int, progress: float) -> bool:
    """Whether the run is done after so many updates, at this share of it."""
    last = phases[-1]
    return progress >= 1.0 if last.num_steps is None else step >= last.first_step + last.num_steps


def _with(config: Config, values: Mapping[str, Any]) -> Config:
    """The config with some fields, given by dotted names."""
    for path, value in values.items():
        section, _, name = path.rpartition(".")
        if section and value_of(config, path) != value:
            changed = dataclasses.replace(getattr(config, section), **{name: value})
            config = dataclasses.replace(config, **{section: changed})
    return config


def _wrong(why: str) -> UserError:
    example = "0%: objective.mask_rate=0.3->0.15; 50%: objective.name=clm"
    return UserError(f"train.phases: {why}; it takes FROM: field=value, field=a->b; FROM: ... such as '{example}'")
