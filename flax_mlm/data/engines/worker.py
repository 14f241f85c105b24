"""Work on one unit on any machine: what every engine maps over the units."""

import dataclasses
import functools
import os
from collections.abc import Callable, Iterable
from typing import ClassVar, TypeAlias

from flax_mlm.config.schema import DataConfig
from flax_mlm.data.cleaning.clean import Cleaning
from flax_mlm.data.sources.base import Unit
from flax_mlm.data.tokenising import tokenise_here
from flax_mlm.data.tokenizer import Tokenizer, load_tokenizer
from flax_mlm.data.units import make_units
from flax_mlm.data.work import Log, Work
from flax_mlm.errors import Failure, UserError
from flax_mlm.storage import buckets, files, retry


@dataclasses.dataclass(frozen=True)
class Task:
    """Work on one unit, in the process that calls it; it can be pickled.

    What is wrong with a text is kept in the folder of unfinished work, since not every engine brings an exception
    back, and those that do try it again first. Further units are not begun then.
    """

    work: Work
    title: ClassVar[str]

    def __call__(self, unit: Unit) -> int:
        """Does the work, unless it is done or another unit has failed. Returns the unit's number.

        Raises:
          Failure: the folder of unfinished work is not there, or a file server does not answer.
        """
        if not buckets.is_one(self.work.folder) and not files.exists(self.work.folder / "units"):
            remedy = "the output must be in a bucket, or on a file system that all workers share under this name"
            raise Failure(f"{self.work.folder} is not there on a worker; {remedy}")
        if self.work.has_failed() or not self.undone([unit]):
            return unit.number
        try:
            self.do(unit)
        except (UserError, OSError) as e:
            if retry.is_transient(e):
                raise
            reason = f"unit {unit.number} cannot be made: {e}; finished units are kept"
            self.work.fail(unit.number, str(e) if isinstance(e, UserError) else reason)
        return unit.number

    def do(self, unit: Unit) -> None:
        """Does the work on a unit. Raises UserError."""
        raise NotImplementedError

    def undone(self, units: Iterable[Unit]) -> list[Unit]:
        """Returns the units on which the work is not done yet."""
        raise NotImplementedError

    def check(self) -> None:
        """Raises UserError where the work on a unit has failed."""
        if messages := self.work.failures():
            others = f" (and {len(messages) - 1:,} more units)" * (len(messages) > 1)
            raise UserError(f"{messages[0]}{others}")


@dataclasses.dataclass(frozen=True)
class RecordUnit(Task):
    """Writes the signature file of a unit."""

    cleaning: Cleaning
    title = "reading signatures"

    def do(self, unit: Unit) -> None:
        self.cleaning.record(unit, self.work)

    def undone(self, units: Iterable[Unit]) -> list[Unit]:
        return self.cleaning.unrecorded(units, self.work)


@dataclasses.dataclass(frozen=True)
class MakeUnit(Task):
    """Tokenises, packs and writes a unit."""

    data: DataConfig
    title = "tokenising"

    def do(self, unit: Unit) -> None:
        tokenizer = _tokenizer(self.work)
        make_units([unit], self.work, tokenizer, self.data, functools.partial(tokenise_here, tokenizer=tokenizer))

    def undone(self, units: Iterable[Unit]) -> list[Unit]:
        return self.work.unfinished(units)


# Does a task on each unit, and adds to the log.
Run: TypeAlias = Callable[[Task, list[Unit], Log], None]


@functools.lru_cache(1)
def _tokenizer(work: Work) -> Tokenizer:
    os.environ["TOKENIZERS_PARALLELISM"] = "false"  # engines run a process per core
    tokenizer = load_tokenizer(work.tokenizer)
    tokenizer.num_threads = 1
    return tokenizer


def last_line(error: Exception) -> str:
    """Returns the line that says what went wrong: engines put the traceback of the worker into their messages."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return lines[-1][:300] if lines else type(error).__name__
