"""One workdir, one run: config.json identifies it, and FREE names the fields that may change when it continues."""

import contextlib
import json
from collections.abc import Iterator

from flax_mlm.checkpoint import store
from flax_mlm.config.load import flatten, from_dict
from flax_mlm.config.schema import Config
from flax_mlm.errors import UserError, as_user_error
from flax_mlm.storage import files, gcs

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
    folder, is_known = workdir / "checkpoints", files.is_json_with(workdir / _FILE, *_SECTIONS)
    entries = [path for path in (folder.iterdir() if folder.is_dir() else []) if path.name[0] != "."]
    if not is_known and (workdir / _FILE).exists():
        yield _FILE
    for path in entries:
        if not store.is_own(path) and not (is_known and (not store.is_step(path) or store.is_remains(path))):
            yield f"checkpoints/{path.name}"
    if not entries and not is_known:
        yield from (name for name in ("metrics.jsonl", "result.json", "clock.json") if (workdir / name).exists())


def take(workdir: gcs.AnyPath, config: Config) -> None:
    """Writes config.json into a new workdir, or checks that the run in it has the same config.

    Raises:
      UserError: the workdir holds a run with another config, or cannot be written.
    """
    with _usable(workdir):
        if not (workdir / _FILE).exists():
            files.write_json(workdir / _FILE, config.to_dict())
            return
    check(workdir, config)


def check(workdir: gcs.AnyPath, config: Config, free: tuple[str, ...] = FREE) -> None:
    """Checks that the run in a workdir, if there is one, has this config, except for the fields and sections in
    `free`. A field that did not exist when the run started counts with its default.

    Raises:
      UserError: a field differs, or config.json cannot be read.
    """
    with _usable(workdir):
        if not (workdir / _FILE).exists():
            return
        stored = flatten(from_dict(json.loads((workdir / _FILE).read_text())).to_dict())
    for name, value in flatten(config.to_dict()).items():
        if stored.get(name) != value and not {name, f"{name.split('.')[0]}."} & {*free}:
            what = f"holds a run with {name} = {stored.get(name)}, and this one has {value}"
            raise UserError(f"--workdir: '{workdir}' {what}; use another --workdir")


@contextlib.contextmanager
def _usable(workdir: gcs.AnyPath) -> Iterator[None]:
    """Raises UserError where the files of a workdir cannot be read or written."""
    kinds = OSError, ValueError, TypeError, AttributeError
    with as_user_error(f"--workdir: '{workdir}' cannot be used: ", *kinds), gcs.errors(workdir):
        yield
