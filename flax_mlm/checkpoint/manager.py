"""Saving and restoring. The only file that imports orbax.

A checkpoint is a folder `workdir/checkpoints/STEP`: `params` (the weights), `average` (of the weights, where the run
keeps one), `rest` (optimizer state and counters), `meta` (JSON: the resolved config, the tokenizer, which text it is,
and dtype, shape and fingerprint of every array) and, written last, the commit marker. It is enough by itself to
evaluate, and can be restored on any number of devices. A step counts when its marker is there, and is used when every
array that is read has its fingerprint.

A kill leaves no half of a step behind (see shelf.py): what is to be deleted is first renamed into
`checkpoints/.trash`, or in a bucket loses its marker. What was damaged is kept, in `checkpoints/.quarantine`.
"""

import base64
import concurrent.futures
import contextlib
import dataclasses
import json
import logging
import os
import re
import tempfile
import time
from collections.abc import Callable
from typing import Any, NamedTuple

from etils import epath
from ml_collections import ConfigDict

from flax_mlm.checkpoint import store as shelf
from flax_mlm.config.load import from_dict
from flax_mlm.config.schema import Config
from flax_mlm.errors import Failure, UserError
from flax_mlm.storage import files, gcs

_FORMAT = 3
_MARKER = "commit_success.txt"  # orbax's AtomicityMode.COMMIT_FILE
_SAVED = {"params", "average", "rest", "meta", "_CHECKPOINT_METADATA", _MARKER}  # all that a step consists of
_META_LIMIT = 1 << 26  # bytes; a tokenizer of 250,000 pieces takes 20 MiB
_RETRIES = {"max_retries": 6, "initial_delay": "1s", "max_delay": "16s"}  # half a minute; else it takes fifteen
_SO_FAR: dict[str, Any] = {"totals": {}, "phase": 0, "place": {}}  # what a run's checkpoint says of it, beside arrays
# What a reader says of the machine it is on, not of what it reads.
_NOT_DAMAGE = re.compile(r"RESOURCE_EXHAUSTED|PERMISSION_DENIED|Permission denied|Too many open files|allocate memory")
_TOKENIZER_FILES = ("tokenizer.model", "tokenizer.json")

Log = Callable[[str], None]
Fingerprint = Callable[[Any], dict[str, Any]]  # see fingerprint.fingerprint_tree


class Damaged(UserError):
    """A checkpoint that is not what was saved. The message is one line, and names the checkpoint and the part."""


def steps_in(workdir: epath.PathLike) -> list[int]:
    """Steps of the committed checkpoints of a run, ascending. Links and half-written folders do not count."""
    folder = epath.Path(workdir) / "checkpoints"
    if not (gcs.is_one(folder) or folder.is_dir()):
        return []
    found = [path for name in shelf.open_store(folder, _MARKER).names() if _is_step(path := folder / name)]
    is_committed = gcs.together(lambda path: (path / _MARKER).exists(), found, folder)
    return sorted(int(path.name) for path, there in zip(found, is_committed, strict=True) if there)


def _is_step(path: epath.Path) -> bool:
    return path.name.isascii() and path.name.isdigit() and str(int(path.name)) == path.name and not _is_link(path)


def _is_link(path: epath.Path) -> bool:
    return os.path.islink(os.fspath(path))


def find(path: str) -> list[epath.Path]:
    """The checkpoints that `path` may mean, newest first: those of a workdir, or the one of WORKDIR@STEP or of a
    checkpoint's own folder.

    Raises:
      UserError: there is none.
    """
    name, _, wanted = path.rpartition("@")
    if not (name and wanted.isdigit()):
        name, wanted = path, ""
    folder = gcs.parse("--checkpoint", name) or epath.Path(name).expanduser().resolve()  # orbax: nothing relative
    gcs.check("--checkpoint", folder)
    with gcs.errors(folder):
        if (folder / _MARKER).exists():
            return [folder]
        if folder.name == "checkpoints":
            folder = folder.parent
        steps = steps_in(folder)
    if not steps:
        raise UserError(f"--checkpoint: no checkpoint in '{folder}'; give the workdir of a run that has saved one")
    if wanted and int(wanted) not in steps:
        raise UserError(f"--checkpoint: '{folder}' has no step {wanted}; it has {', '.join(map(str, steps))}")
    return [folder / "checkpoints" / str(step) for step in ([int(wanted)] if wanted else reversed(steps))]


def read_meta(checkpoint: epath.Path) -> dict[str, Any]:
    """The `meta` item of a checkpoint folder.

    Raises:
      Damaged: it cannot be read, or is not what was saved.
      Failure: it cannot be read here and now.
      UserError: it was saved by another version.
    """
    file = checkpoint / "meta" / "metadata"
    try:
        with gcs.errors(checkpoint):
            if not 0 < (size := file.stat().length) <= _META_LIMIT:
                raise ValueError(f"it has {size} bytes")
            meta = json.loads(file.read_text())
        if isinstance(meta["format"], int) and meta["format"] != _FORMAT:
            raise UserError(f"checkpoint '{checkpoint}' has format {meta['format']}; this version reads {_FORMAT}")
        if meta["sha256"] != files.digest(meta):
            raise ValueError("its checksum is not that of its content")
        _check_types(meta)
    except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError) as e:
        _check_machine(checkpoint, e)
        raise Damaged(f"checkpoint '{checkpoint}': its meta is damaged ({type(e).__name__}: {e})") from e
    return meta


def _check_machine(checkpoint: epath.Path, e: Exception) -> None:
    """Raises Failure: what went wrong with reading is no fault of the checkpoint."""
    said = " ".join(str(e).split()) or type(e).__name__
    if isinstance(e, MemoryError) or _NOT_DAMAGE.search(said):
        raise Failure(f"checkpoint '{checkpoint}' cannot be read here, and is left as it is: {said}") from e


def _check_types(meta: dict[str, Any]) -> None:
    """A checkpoint may come from anyone."""
    kinds = {"step": int, "corpus": str, "text": dict, "config": dict, "tokenizer": dict, "arrays": dict}
    wrong = [name for name, kind in kinds.items() if type(meta[name]) is not kind]
    so_far = {name: meta.get(name, default) for name, default in _SO_FAR.items()}
    numbers = {**so_far["totals"], **so_far["place"].get("taken", {})}
    whole = {"phase": so_far["phase"], **{k: v for k, v in so_far["place"].items() if k != "taken"}}
    wrong += [name for name, number in numbers.items() if type(number) not in (int, float)]
    wrong += [name for name, number in whole.items() if type(number) is not int or number < 0]
    wrong += [name for name, entry in meta["arrays"].items() if [type(x) for x in entry] != [str, list, str]]
    if wrong:
        raise ValueError(f"{wrong[0]} is of a wrong type")
    if meta["tokenizer"]["filename"] not in _TOKENIZER_FILES:
        raise ValueError(f"its tokenizer's file is not one of {', '.join(_TOKENIZER_FILES)}")
    base64.b64decode(meta["tokenizer"]["base64"], validate=True)


def newest(path: str) -> tuple[epath.Path, dict[str, Any]]:
    """Of the checkpoints that `path` may mean, the first with a sound `meta`, and that."""
    damaged = None
    for checkpoint in find(path):
        try:
            return checkpoint, read_meta(checkpoint)
        except Damaged as e:
            damaged = damaged or e
    assert damaged
    raise damaged


def read_config(path: str) -> ConfigDict:
    """The config of a checkpoint's last step, with a mesh that fits whatever devices are here."""
    _, meta = newest(path)
    config = config_of(meta)
    config.mesh.data, config.mesh.fsdp, config.mesh.tensor = -1, 1, 1
    return config


def config_of(meta: dict[str, Any]) -> ConfigDict:
    """The config that the last step before a checkpoint was made with: that of its phase."""
    config = from_dict(meta["config"])
    config.train.phases = ""
    return config


def read_tokenizer(meta: dict[str, Any]) -> Any:
    """The tokenizer stored in a checkpoint's `meta` (`data.tokenizer.Tokenizer`)."""
    from flax_mlm.data.tokenizer.load import load_tokenizer

    stored = meta["tokenizer"]
    with tempfile.TemporaryDirectory() as folder:
        file = epath.Path(folder) / stored["filename"]
        file.write_bytes(base64.b64decode(stored["base64"]))
        return load_tokenizer(file)


def make_meta(config: Config, tokenizer: Any, corpus: str, text: dict[str, Any]) -> dict[str, Any]:
    """What a checkpoint carries beside arrays.

    Args:
      corpus: its fingerprint; empty where there is none.
      text: `Corpus.about`; empty where there is none.
    """
    return {
        "format": _FORMAT,
        "config": config.to_dict(),
        "tokenizer": {"filename": tokenizer.filename, "base64": base64.b64encode(tokenizer.content).decode()},
        "corpus": corpus,
        "text": text,
    }


def restore(checkpoint: epath.Path, meta: dict[str, Any], abstract: dict[str, Any], fingerprint: Fingerprint) -> Any:
    """Some items of a checkpoint, every array checked.

    Args:
      checkpoint: its folder.
      meta: what `read_meta` says of it.
      abstract: by item ("params", "average", "rest"), a tree of shapes, dtypes and shardings.
      fingerprint: jitted `fingerprint.fingerprint_tree`.

    Raises:
      UserError: it holds other arrays than asked for; said before any is read.
      Damaged: it cannot be read, or an array is not what was saved.
    """
    import jax
    import orbax.checkpoint as ocp

    from flax_mlm.checkpoint.fingerprint import leaves, table

    stored = {name: entry for name, entry in meta["arrays"].items() if name.split("/")[0] in abstract}
    wanted = {name: [str(x.dtype), list(x.shape)] for name, x in leaves(abstract).items()}
    for name in sorted(stored.keys() | wanted.keys()):
        here, there = wanted.get(name), stored.get(name, [None])[:2] if name in stored else None
        if here != there:
            raise UserError(f"checkpoint '{checkpoint}' has {name} {_shape(there)}; this config has {_shape(here)}")
    _bound_retries()
    args = {item: ocp.args.StandardRestore(tree) for item, tree in abstract.items()}
    try:
        with ocp.Checkpointer(ocp.CompositeCheckpointHandler()) as checkpointer:
            restored = checkpointer.restore(checkpoint, args=ocp.args.Composite(**args))
    except Exception as e:  # whatever a damaged folder makes orbax raise
        if gcs.is_one(checkpoint) and (explained := gcs.explain(checkpoint, e)):
            raise explained from e  # the bucket, and not the checkpoint
        _check_machine(checkpoint, e)
        said = str(e).splitlines()[0] if str(e) else repr(e)
        raise Damaged(f"checkpoint '{checkpoint}' cannot be read ({said})") from e
    items = {item: restored[item] for item in abstract}
    found = table(items, jax.device_get(fingerprint(items)))
    for name, entry in found.items():
        if entry != stored[name]:
            raise Damaged(f"checkpoint '{checkpoint}': {name} is not what was saved (a damaged or changed file)")
    return items


def _items(state: Any) -> dict[str, Any]:
    """What of a TrainState is saved apart."""
    rest = state._asdict()
    average = rest.pop("average", None)
    items = {"params": state.params, "rest": {**rest, "params": None}}
    return items if average is None else {**items, "average": average}


def _shape(entry: list[Any] | None) -> str:
    return f"as {entry[0]} {tuple(entry[1])}" if entry else "not at all"


def _bound_retries() -> None:
    """Sets how long tensorstore asks a bucket that does not answer. Orbax has no option for it."""
    from orbax.checkpoint._src.serialization import tensorstore_utils

    tensorstore_utils._DEFAULT_OCDBT_TS_CONTEXT["gcs_request_retries"] = _RETRIES


class FineTuned(NamedTuple):
    """The weights of a model that goes on from no step, with the step of the run that they come from."""

    params: Any
    step: Any


def save_encoder(workdir: gcs.AnyPath, trained: Any, encoder: Any, examples: int) -> None:
    """Saves an encoder fine-tuned for vectors as a checkpoint, enough to evaluate, embed and export.

    Args:
      workdir: a new folder.
      trained: the `trained.LoadedModel` that it was fine-tuned from; what it has beside the encoder is kept.
      encoder: the new parameters.
      examples: how many pairs it has learned from.

    Raises:
      Failure: it cannot be written.
    """
    import jax.numpy as jnp

    before = trained.meta
    meta = make_meta(trained.config, trained.tokenizer, before.get("corpus", ""), before.get("text", {}))
    meta["fine_tuned"] = {"examples": examples}
    config = dataclasses.replace(trained.config, train=dataclasses.replace(trained.config.train, max_failed_saves=1))
    step = before.get("step", 0)
    checkpoints = Checkpoints(workdir, config, meta, trained.steps.fingerprint)
    state = FineTuned({**trained.params, "encoder": encoder}, jnp.int32(step))
    checkpoints.save(step, state, so_far={"totals": before.get("totals", {})})
    checkpoints.close()


class Checkpoints:
    """The checkpoints of one run: asynchronous saves, two-tier retention, newest sound step first.

    With several processes every process makes one and calls the same methods; process 0 tends the folder.

    Attributes:
      failed_in_a_row: saves.
      so_far: what was saved with the step that was restored last; empty where there is none.
    """

    def __init__(
        self,
        workdir: gcs.AnyPath,
        config: Config,
        meta: dict[str, Any],
        fingerprint: Fingerprint,
        lost_within: float = 0.0,
    ):
        """Sweeps what a killed run left.

        Args:
          meta: stored with every checkpoint; see `make_meta`.
          lost_within: seconds within which the loss of a process has ended the others (`ProcessGroup.lost_within`).
        """
        import jax
        import orbax.checkpoint as ocp
        from orbax.checkpoint.options import AtomicityMode, AtomicityOptions

        self._train, self._meta, self._fingerprint = config.train, meta, fingerprint
        self._lost_within = lost_within
        self._workdir, self._folder = workdir, workdir / "checkpoints"
        self._is_main, self._is_alone = jax.process_index() == 0, jax.process_count() == 1
        _bound_retries()
        self._checkpointer = ocp.AsyncCheckpointer(
            ocp.CompositeCheckpointHandler(), atomicity_options=AtomicityOptions(mode=AtomicityMode.COMMIT_FILE)
        )
        self._saving: int | None = None
        self._newest: int | None = None  # of those that were committed
        self.failed_in_a_row, self.so_far = 0, dict[str, Any]()
        self._tidy = concurrent.futures.ThreadPoolExecutor(1, "checkpoints")
        # What it has to say it also raises, and we report that.
        logging.getLogger("absl").addFilter(lambda record: "orbax" not in record.pathname)
        self._shelf = shelf.open_store(self._folder, _MARKER)
        if self._is_main:
            self._shelf.make()
            self._sweep()
            self._shelf.empty()

    def _sweep(self) -> None:
        """Clears away what is named like a step and is none: it would be in the way of saving that step."""
        committed = steps_in(self._workdir)
        for name in self._shelf.names():
            path = epath.Path(self._folder / name)
            if not name.isdigit() or (_is_step(path) and int(name) in committed):
                continue
            if _is_step(path) and path.is_dir() and {entry.name for entry in path.iterdir()} <= _SAVED:
                self._shelf.discard(name)  # a save that was killed or failed
            else:
                self._shelf.quarantine(name)

    def save(
        self,
        step: int,
        state: Any,
        before: Callable[[], None] = lambda: None,
        so_far: dict[str, Any] | None = None,
    ) -> bool:
        """Starts saving a TrainState (a NamedTuple with `params`), once the last save is done; returns when it is
        copied from the devices. A failure is reported, counted and cleaned up; the next save tries again.

        Args:
          step: the number of updates that were made.
          state: what they have made of it.
          before: is called by process 0 before anything is written; its UserError or Failure is raised, except that a
            bucket that does not answer is a failure to save as any other.
          so_far: of the run until this step (JSON): `config` (that of its phase, but with all of `train.phases`); and
            to be found again in `so_far`, `totals` (numbers, see `metrics.Throughput`), `phase` (the number of it) and
            `place` (a `data.stream.Place`, as a dict). What process 0 says is kept.

        Returns:
          Whether it was started.

        Raises:
          Failure: the state is not finite; more saves in a row have failed than allowed; or one failed among
            several processes, which can only go on together.
        """
        import jax
        import orbax.checkpoint as ocp

        from flax_mlm.checkpoint.fingerprint import table

        self.wait()
        try:
            with gcs.errors(self._workdir):
                if self._is_main:
                    before()
                if self._agreed(int(step in steps_in(self._workdir))):
                    return True
        except (OSError, gcs.Unreachable) as e:
            self._saving = step
            self._failed(e)
            return False
        items = _items(state)
        fingerprints = jax.device_get(self._fingerprint(items))
        for name, (_, _, not_finite) in fingerprints.items():
            if not_finite:
                raise Failure(f"step {step} is not saved: {not_finite} values of {name} are not finite")
        meta = {**self._meta, "step": step, **(so_far or {}), "arrays": table(items, fingerprints)}
        meta["sha256"] = files.digest(meta)
        args = {item: ocp.args.StandardSave(tree) for item, tree in items.items()}
        self._saving = step
        try:
            if self._is_main:
                self._sweep()  # a failed save may have gone on in the background
            self._checkpointer.save(
                epath.Path(self._folder / str(step)),
                args=ocp.args.Composite(**args, meta=ocp.args.JsonSave(meta)),
                force=True,
            )
        except Exception as e:
            self._failed(e)
            return False
        return True

    def wait(self) -> bool:
        """Waits until the last save is committed. Returns whether it is, and raises as `save` does."""
        if self._saving is None:
            return True
        try:
            self._checkpointer.wait_until_finished()
            # The folder is what counts, not what was reported.
            if self._is_main and self._saving not in steps_in(self._workdir):
                raise FileNotFoundError(f"{self._folder / str(self._saving)} is not there")
        except Exception as e:
            self._failed(e)
            return False
        self.failed_in_a_row = 0
        self._newest, self._saving = self._saving, None
        if self._is_main:
            self._tidy.submit(self._retain, self._newest)
        return True

    def _failed(self, e: Exception) -> None:
        step, self._saving = self._saving, None
        self.failed_in_a_row += 1
        said = f"step {step} could not be saved ({type(e).__name__}: {' '.join(str(e).split())[:300]})"
        try:
            with gcs.errors(self._workdir):
                if self._is_main:
                    with contextlib.suppress(OSError):  # as on a full disk; the next save sweeps again
                        self._sweep()
                kept = steps_in(self._workdir)
            rest = f"step {kept[-1]} is the last one saved" if kept else "nothing is saved yet"
        except gcs.Unreachable:
            rest = "which one is the last one saved cannot be seen"
        if not self._is_alone or self.failed_in_a_row >= self._train.max_failed_saves:
            raise Failure(f"{said}; {self.failed_in_a_row} saves in a row have failed; {rest}") from e
        print(f"WARNING: {said}; {rest}; the next save will try again", flush=True)

    def restore_latest(self, abstract: Any, log: Log) -> Any | None:
        """Restores the newest sound state; returns None where nothing was ever saved.

        Args:
          abstract: a TrainState of shapes, dtypes and shardings.
          log: called with one line for each checkpoint that is restored, or skipped, and why.

        Raises:
          UserError: there are checkpoints, but none is sound; or they belong to another run.
          Failure: one cannot be read, though it is not damaged; or, with several processes, the newest is damaged.
        """
        items = _items(abstract)
        while (step := self._agreed(max(steps_in(self._workdir), default=-1))) >= 0:
            try:
                meta, state = self._try_restore(step, items)
            except Damaged as e:
                self._put_aside(step, e, log)
                continue
            log(f"restored step {step} from {self._folder / str(step)}")
            self.so_far = {name: meta[name] for name in _SO_FAR if name in meta}
            return abstract._replace(**{**state.pop("rest"), **state})
        # Also when an earlier start has put them aside: a run never starts over by itself.
        if self._shelf.has_quarantine():
            raise UserError(
                f"none of the checkpoints in '{self._workdir}' is sound (they are in checkpoints/.quarantine); "
                "use another --workdir"
            )
        return None

    def _try_restore(self, step: int, items: dict[str, Any]) -> tuple[dict[str, Any], dict[str, Any]]:
        """The `meta` and the items of one step. Raises as `restore`, and UserError where it belongs to another run."""
        checkpoint = epath.Path(self._folder / str(step))
        meta = read_meta(checkpoint)
        if meta["corpus"] != self._meta["corpus"]:
            raise UserError(
                f"--workdir: '{self._workdir}' was trained on corpus {meta['corpus'][:12]}, and this is "
                f"{self._meta['corpus'][:12]}; use another --workdir"
            )
        return meta, restore(checkpoint, meta, items, self._fingerprint)

    def _put_aside(self, step: int, damage: Damaged, log: Log) -> None:
        """Moves a damaged step to quarantine. With several processes raises Failure: the others may have read it."""
        if not self._is_alone:
            time.sleep(self._lost_within)  # losing a peer fails the reading here, too, and then the run ends first
        where = self._shelf.quarantine(str(step))
        log(f"checkpoint {step} skipped, and moved to {where}: {damage}")
        if not self._is_alone:
            raise Failure(f"{damage}; it is moved to {where}; start again from the step before") from damage

    def _agreed(self, step: int) -> int:
        """What process 0 says, for it is the one that tidies up meanwhile."""
        if self._is_alone:
            return step
        import numpy as np
        from jax.experimental import multihost_utils

        return int(multihost_utils.broadcast_one_to_all(np.int32(step)))

    def _retain(self, newest: int) -> None:
        """Deletes what retention does not keep: the last scheduled steps, the newest, and every M-th stay. Not before
        the newest is on the disk, and not only in its cache. Where saves come faster than that, the last one counts."""
        if newest != self._newest:
            return
        train = self._train
        try:
            with gcs.errors(self._folder):
                steps = steps_in(self._workdir)
                keep = {s for s in steps if train.keep_period and s % train.keep_period == 0} | {newest}
                keep |= set([s for s in steps if s % train.checkpoint_every == 0][-train.max_to_keep :])
                self._shelf.settle(str(newest))
                for step in steps:
                    if step not in keep:
                        self._shelf.discard(str(step))
        except (OSError, UserError, Failure) as e:
            print(f"WARNING: old checkpoints could not be deleted ({e}); the next save will try again", flush=True)

    def close(self) -> None:
        """Waits for the last save and the tidying up; raises as `save` does."""
        self.wait()
        self._tidy.shutdown()
        self._checkpointer.close()
