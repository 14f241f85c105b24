"""Saving and restoring. The only file that imports orbax.

A checkpoint is a folder `workdir/checkpoints/STEP` with three items: `params` (the weights), `rest` (optimizer
state and counters) and `meta` (JSON: the resolved config, the tokenizer, the corpus's fingerprint). It is enough
by itself to evaluate, and can be restored on any number of devices.
"""

import base64
import json
import tempfile
from collections.abc import Callable
from typing import Any

from etils import epath
from ml_collections import ConfigDict

from flax_mlm import config as config_lib
from flax_mlm.errors import UserError

_FORMAT = 1


def steps_in(workdir: epath.PathLike) -> list[int]:
    """Steps of the complete checkpoints of a run, ascending. A folder without its `meta` is not one."""
    folder = epath.Path(workdir) / "checkpoints"
    if not folder.is_dir():
        return []
    return sorted(int(p.name) for p in folder.iterdir() if p.name.isdigit() and _meta_file(p).exists())


def find(path: str) -> epath.Path:
    """The checkpoint that `path` names: a workdir (its newest), WORKDIR@STEP, or the checkpoint's own folder.

    Raises:
      UserError: there is none.
    """
    name, _, wanted = path.rpartition("@")
    if not (name and wanted.isdigit()):
        name, wanted = path, ""
    folder = epath.Path(name).expanduser().resolve()  # orbax takes no relative path
    if _meta_file(folder).exists():
        return folder
    if folder.name == "checkpoints":
        folder = folder.parent
    steps = steps_in(folder)
    if not steps:
        raise UserError(f"--checkpoint: no checkpoint in '{folder}'; give the workdir of a run that has saved one")
    if wanted and int(wanted) not in steps:
        raise UserError(f"--checkpoint: '{folder}' has no step {wanted}; it has {', '.join(map(str, steps))}")
    return folder / "checkpoints" / (wanted or str(steps[-1]))


def read_meta(checkpoint: epath.Path) -> dict[str, Any]:
    """The `meta` item of a checkpoint folder."""
    try:
        meta = json.loads(_meta_file(checkpoint).read_text())
    except ValueError as e:
        raise UserError(f"checkpoint '{checkpoint}': its meta is not JSON ({e}); use another step") from e
    if meta.get("format") != _FORMAT:
        raise UserError(f"checkpoint '{checkpoint}' has format {meta.get('format')}; this version reads {_FORMAT}")
    return meta


def read_config(path: str) -> ConfigDict:
    """The config stored in a checkpoint, with a mesh that fits whatever devices are here."""
    config = config_lib.from_dict(read_meta(find(path))["config"])
    config.mesh.data, config.mesh.fsdp, config.mesh.tensor = -1, 1, 1
    return config


def read_tokenizer(checkpoint: epath.Path) -> Any:
    """The tokenizer stored in a checkpoint (`data.tokenizer.Tokenizer`)."""
    from flax_mlm.data import tokenizer

    stored = read_meta(checkpoint)["tokenizer"]
    with tempfile.TemporaryDirectory() as folder:
        file = epath.Path(folder) / stored["filename"]
        file.write_bytes(base64.b64decode(stored["base64"]))
        return tokenizer.load(file)


def restore_params(checkpoint: epath.Path, abstract: Any) -> Any:
    """The weights alone, laid out as `abstract` (shapes, dtypes and shardings)."""
    import orbax.checkpoint as ocp

    with ocp.StandardCheckpointer() as checkpointer:
        return checkpointer.restore(checkpoint / "params", abstract)


def _meta_file(checkpoint: epath.Path) -> epath.Path:
    return checkpoint / "meta" / "metadata"


class Checkpoints:
    """The checkpoints of one run: asynchronous saves, two-tier retention, newest readable step first."""

    def __init__(self, workdir: epath.PathLike, config: config_lib.Config, meta: dict[str, Any]):
        """`meta` is stored with every checkpoint; see `make_meta`."""
        import orbax.checkpoint as ocp
        from orbax.checkpoint import checkpoint_managers as policies

        self._ocp, self._workdir, self._meta = ocp, epath.Path(workdir), meta
        keep = [policies.LatestN(config.train.keep_last)]
        if config.train.keep_every:
            keep.append(policies.EveryNSteps(config.train.keep_every))
        self._manager = ocp.CheckpointManager(
            self._workdir / "checkpoints",
            options=ocp.CheckpointManagerOptions(
                preservation_policy=policies.AnyPreservationPolicy(keep),
                cleanup_tmp_directories=True,
                # Deleting in place leaves, when killed, a step that is listed and cannot be read.
                todelete_subdir=".trash",
            ),
        )

    def save(self, step: int, state: Any) -> None:
        """Starts saving a TrainState (a NamedTuple with `params`); returns once it is copied from the devices."""
        save = self._ocp.args
        self._manager.save(
            step,
            args=save.Composite(
                params=save.StandardSave(state.params),
                rest=save.StandardSave(state._replace(params=None)._asdict()),
                meta=save.JsonSave({**self._meta, "step": step}),
            ),
            force=True,
        )

    def restore_latest(self, abstract: Any, log: Callable[[str], None]) -> Any | None:
        """The newest state that can be read, or None where nothing was ever saved.

        Raises:
          UserError: there are checkpoints, but none can be read.
        """
        steps = steps_in(self._workdir)
        for step in reversed(steps):
            args = self._ocp.args
            try:
                held = read_meta(self._workdir / "checkpoints" / str(step))["corpus"]
                items = self._manager.restore(
                    step,
                    args=args.Composite(
                        params=args.StandardRestore(abstract.params),
                        rest=args.StandardRestore(abstract._replace(params=None)._asdict()),
                    ),
                )
            except Exception as e:  # whatever a damaged folder makes orbax raise
                log(f"checkpoint {step} skipped, it cannot be read: {str(e).splitlines()[0] if str(e) else repr(e)}")
                continue
            if held != self._meta["corpus"]:
                raise UserError(
                    f"--workdir: '{self._workdir}' was trained on corpus {held[:12]}, and this is "
                    f"{self._meta['corpus'][:12]}; use another --workdir"
                )
            self._discard_after(step)
            log(f"restored step {step} from {self._workdir / 'checkpoints' / str(step)}")
            return type(abstract)(**{**items["rest"], "params": items["params"]})
        if steps:
            raise UserError(f"none of the checkpoints in '{self._workdir}' can be read; use another --workdir")
        self._discard_after(-1)
        return None

    def _discard_after(self, step: int) -> None:
        """Removes later steps, which could not be read: they would count as the newest, and could not be saved anew."""
        for later in self._manager.all_steps():
            if later > step:
                self._manager.delete(later)

    def close(self) -> None:
        """Waits for the last save and raises what went wrong in the background."""
        self._manager.wait_until_finished()
        self._manager.close()


def make_meta(config: config_lib.Config, tokenizer: Any, corpus_fingerprint: str) -> dict[str, Any]:
    """What a checkpoint carries beside arrays."""
    return {
        "format": _FORMAT,
        "config": config.to_dict(),
        "tokenizer": {
            "filename": tokenizer.filename,
            "base64": base64.b64encode(tokenizer.content).decode(),
        },
        "corpus": corpus_fingerprint,
    }
