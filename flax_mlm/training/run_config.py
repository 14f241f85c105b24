"""One workdir, one run: config.json identifies it, and FREE names the fields that may change when it continues."""

import contextlib
import os
from collections.abc import Callable, Iterator
from typing import Any

from flax_mlm.checkpoint import store
from flax_mlm.checkpoint.format import newest_meta, stored_run
from flax_mlm.config.load import build, flatten, from_dict
from flax_mlm.config.phases import parse_phases
from flax_mlm.config.schema import Config
from flax_mlm.errors import UserError, as_user_error
from flax_mlm.storage import files, gcs
from flax_mlm.storage.retry import retrying
from flax_mlm.training import extension
from flax_mlm.training.extension import Layout

_FILE = "config.json"
_SECTIONS = ("data", "model", "objective", "optimizer", "train", "mesh")

# May differ between a run and its continuation: they change where, how often or how fast, not what is learned.
FREE = (
    *("data.cache_dir", "data.num_workers", "train.gradient_accumulation_steps", "train.logits_chunks"),
    *("model.attention", "model.scan_layers", "model.remat"),
    *("train.log_every", "train.eval_every", "train.cloze_every", "train.checkpoint_every", "train.stall_timeout"),
    *("train.max_to_keep", "train.keep_period", "train.max_failed_saves"),
    *("eval.", "finetune.", "mesh.", "log."),
)


# May differ, too: the same content can have another path. Fingerprints in the checkpoints tell whether it is the same.
MOVABLE = ("data.source", "data.corpus", "tokenizer.path", "tokenizer.extra_tokens_file", "init_from")


@retrying
def refuse_foreign(workdir: gcs.AnyPath) -> None:
    """Checks that nothing in a workdir belongs to another program, before anything in it is touched: a run deletes,
    moves and rewrites files under the names that it uses.

    Raises:
      UserError: the folder holds files of those names that no run of flax_mlm has written, or cannot be read.
    """
    with _usable(workdir):
        foreign = next(_foreign(workdir), None)
    if foreign:
        what = f"holds '{foreign}', which no run of flax_mlm has written"
        raise UserError(f"--workdir: '{workdir}' {what}; use a new folder, or move it away")


def _foreign(workdir: gcs.AnyPath) -> Iterator[str]:
    """Files that a run would change, and that are not known to be one's."""
    folder, config = workdir / "checkpoints", _read(workdir)
    entries = [path for path in (folder.iterdir() if files.exists(folder) else []) if path.name[0] != "."]
    foreign = [path for path in entries if not store.is_own(path)]
    is_known = bool(config) or len(foreign) < len(entries)
    is_other = not config and files.exists(workdir / _FILE)
    if is_other and (not is_known or files.read_object(workdir / _FILE) is not None):
        yield _FILE  # of a run it is damaged, and no JSON any more
    for path in foreign:
        if not (is_known and (not store.is_step(path) or store.is_remains(path))):
            yield f"checkpoints/{path.name}"
    if not entries and not is_known:
        yield from (name for name in ("metrics.jsonl", "result.json", "clock.json") if files.exists(workdir / name))


def _read(workdir: gcs.AnyPath) -> dict[str, Any]:
    """Reads config.json; empty where there is none, or it is damaged or another program's."""
    return files.read_object(workdir / _FILE, *_SECTIONS) or {}


def _of_newest_checkpoint(workdir: gcs.AnyPath) -> dict[str, Any]:
    """Returns the config that the newest checkpoint of a workdir has; empty where there is none."""
    return stored_run(newest_meta(os.fspath(workdir))[1]) if store.saved_steps(workdir) else {}


@retrying
def take(
    workdir: gcs.AnyPath, config: Config, log: Callable[[str], None] = print, layout: Layout = parse_phases
) -> None:
    """Writes config.json into a new workdir, or checks that the run in it has the same config, but for paths and a
    length that may be raised (see `extension`); a lost or damaged config.json is restored.

    Args:
      layout: the phases of a config, with the steps that its corpora give.

    Raises:
      UserError: the workdir holds a run with another config, or cannot be written.
    """
    with _usable(workdir):
        written = _read(workdir)
        if stored := written or _of_newest_checkpoint(workdir):
            refuse_other(
                f"--workdir: '{workdir}' holds", stored, config, (*FREE, *MOVABLE),
                lambda old: extension.why_not(old, config, _done(workdir, old.train), layout),
            )  # fmt: skip
    if not written:
        record(workdir, config)
    if stored and not written:
        log(f"{workdir / _FILE} was lost or damaged, and is restored as the newest checkpoint has it")


def record(workdir: gcs.AnyPath, config: Config) -> None:
    """Writes config.json, where it is not there or has other paths or another length. Raises UserError where it cannot
    be written.
    """
    with _usable(workdir):
        stored, now = flatten(_read(workdir)), flatten(config.to_dict())
        if any(stored.get(name) != now[name] for name in (*MOVABLE, *extension.FIELDS)):
            files.write_json(workdir / _FILE, config.to_dict())


@retrying
def check(workdir: gcs.AnyPath, config: Config, free: tuple[str, ...] = FREE) -> None:
    """Checks that the run in a workdir, if there is one, has this config, except for the fields and sections in
    `free`. A field that did not exist when the run started counts with its default.

    Raises:
      UserError: a field differs, or the workdir cannot be read.
    """
    with _usable(workdir):
        if stored := _read(workdir) or _of_newest_checkpoint(workdir):
            refuse_other(f"--workdir: '{workdir}' holds", stored, config, free)


def refuse_other(
    holder: str,
    stored: dict[str, Any],
    config: Config,
    free: tuple[str, ...],
    why_not_longer: Callable[[Config], str] | None = None,
) -> None:
    """Compares the config of a run with that of its continuation; see `check`.

    Args:
      holder: the beginning of the message, such as `'runs/a' holds`.
      stored: as it was saved.
      why_not_longer: says why a run with that config cannot go on with this one's length, see `extension.why_not`;
        None: it may not be longer.

    Raises:
      UserError: a field differs.
    """
    before = from_dict(stored)
    theirs, ours = _kept(before.to_dict(), free), _kept(config.to_dict(), free)
    differ = [name for name in ours if theirs.get(name) != ours[name]]
    if "train.phases" in differ and _phases(build(before), free) == _phases(config, free):
        differ.remove("train.phases")  # they differ in what is free
    reason = ""
    if differ and why_not_longer and {*differ} <= {*extension.FIELDS}:
        if not (reason := why_not_longer(build(before))):
            return
        differ.sort(key=extension.FIELDS.index)
    for name in differ[:1]:
        what = f"{holder} a run with {name} = {theirs.get(name)}, and this one has {ours[name]}"
        raise UserError(f"{what}{reason and f': {reason}'}; {'or ' * bool(reason)}use another --workdir")


def _kept(values: dict[str, Any], free: tuple[str, ...]) -> dict[str, Any]:
    return {name: x for name, x in flatten(values).items() if not {name, f"{name.split('.')[0]}."} & {*free}}


def _phases(config: Config, free: tuple[str, ...]) -> list[Any]:
    kept = (*free, "train.phases")
    return [(p.begin, dict(p.final_values), _kept(p.config.to_dict(), kept)) for p in parse_phases(config)]


def _done(workdir: gcs.AnyPath, train: Any) -> extension.Done:
    """Position of the run in a workdir at its newest checkpoint, with its progress in the length that `train` has."""
    try:
        meta = newest_meta(os.fspath(workdir))[1]
    except UserError:  # there is none yet
        return extension.Done()
    stored = meta["config"]["train"]
    ratio = stored["budget_minutes"] / train.budget_minutes if train.budget_minutes else 1.0
    return extension.Done(meta["step"], meta.get("progress", 1.0) * ratio)


@contextlib.contextmanager
def _usable(workdir: gcs.AnyPath) -> Iterator[None]:
    """Raises UserError where the files of a workdir cannot be read or written."""
    kinds = OSError, ValueError, TypeError, AttributeError
    with as_user_error(f"--workdir: '{workdir}' cannot be used: ", *kinds), gcs.errors(workdir):
        yield
