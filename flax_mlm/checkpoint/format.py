"""The checkpoint format: what a checkpoint consists of, and how it is found, checked and read.

A checkpoint is a folder `WORKDIR/checkpoints/STEP`: `params` (the weights), `average` (their average, where the run
keeps one), `rest` (optimizer state and counters), `meta` (JSON: the resolved config, the tokenizer, the corpus, and
dtype, shape and fingerprint of every array) and, written last, the commit marker. It is enough by itself to evaluate,
and can be restored on any number of devices. A step counts once its marker exists, and is used if every array that is
read has its fingerprint.
"""

import base64
import contextlib
import json
import re
from collections.abc import Iterator
from typing import Any

from etils import epath
from ml_collections import ConfigDict

from flax_mlm.checkpoint.store import MARKER, bound_retries, check_name, is_own, saved_steps
from flax_mlm.config import load, schema
from flax_mlm.data.tokenizer import TOKENIZERS, Tokenizer
from flax_mlm.errors import Failure, UserError, hub_remedy
from flax_mlm.storage import buckets, files, gcs
from flax_mlm.storage.retry import retrying

FORMAT = 4
_EXPECTED = "give the workdir of a run that has saved one, or a Hugging Face folder with config.json and weights"
_READ_BACK_BYTES = 1 << 28
_META_LIMIT = 1 << 26  # bytes; a tokenizer of 250,000 tokens takes 20 MiB
# Errors of the machine that reads, not of the checkpoint.
_NOT_DAMAGE = re.compile(r"RESOURCE_EXHAUSTED|PERMISSION_DENIED|Permission denied|Too many open files|allocate memory")
_TYPES = {"step": int, "corpus": str, "text": dict, "config": dict, "tokenizer": dict, "arrays": dict}


class Damaged(UserError):
    """A checkpoint that differs from what was saved. The message is one line, and names the checkpoint and the part."""


@retrying
def find_checkpoints(path: str) -> list[epath.Path]:
    """Lists the checkpoints that `path` may mean, newest first.

    Args:
      path: the workdir of a run, WORKDIR@STEP, or the folder of one checkpoint. A folder of this name, with @STEP and
        all, goes first.

    Raises:
      UserError: there is none, or another program has written it.
    """
    folder, step = _folder(path), ""
    name, _, number = path.rpartition("@")
    with gcs.errors(folder):
        if name and number.isascii() and number.isdigit() and not files.exists(folder):
            folder, step = _folder(name), number
        if files.exists(folder / MARKER):
            found = [folder]
        else:
            folder = folder.parent if folder.name == "checkpoints" else folder
            found = [folder / "checkpoints" / str(step) for step in reversed(saved_steps(folder))]
        own = buckets.together(is_own, found, folder)
    if not any(own):
        what = "a checkpoint of another program, and none of flax_mlm," if found else "no checkpoint"
        hub = f"; {hub_remedy(path)}" if hub_remedy(path) else ""
        raise UserError(f"--checkpoint: {what} in '{folder}'; {_EXPECTED}{hub}")
    found = [checkpoint for checkpoint, is_ours in zip(found, own, strict=True) if is_ours]
    if step and not (asked := [checkpoint for checkpoint in found if checkpoint.name == str(int(step))]):
        steps = ", ".join(checkpoint.name for checkpoint in reversed(found))
        raise UserError(f"--checkpoint: '{folder}' has no step {step}; it has {steps}")
    return asked if step else found


def _folder(path: str) -> epath.Path:
    folder = gcs.parse("--checkpoint", path) or epath.Path(path).expanduser().resolve()  # orbax takes no relative path
    check_name("--checkpoint", folder)
    gcs.check("--checkpoint", folder)
    return folder


def make_meta(config: schema.Config, tokenizer: Tokenizer, corpus: str, text: dict[str, Any]) -> dict[str, Any]:
    """Makes the `meta` that all checkpoints of a run share.

    Args:
      corpus: fingerprint of the corpus; empty where there is none.
      text: `Corpus.about`; empty where there is none.
    """
    stored = {"filename": tokenizer.filename, "base64": base64.b64encode(tokenizer.content).decode()}
    return {"format": FORMAT, "config": config.to_dict(), "tokenizer": stored, "corpus": corpus, "text": text}


@retrying
def read_meta(checkpoint: epath.Path) -> dict[str, Any]:
    """Reads the `meta` of a checkpoint folder.

    Raises:
      Damaged: it cannot be read, or differs from what was saved.
      Failure: it cannot be read on this machine now.
      UserError: another version saved it.
    """
    file = checkpoint / "meta" / "metadata"
    try:
        with gcs.errors(checkpoint):
            if not 0 < (size := file.stat().length) <= _META_LIMIT:
                raise ValueError(f"it has {size} bytes")
            meta = json.loads(file.read_text())
        if isinstance(meta["format"], int) and meta["format"] != FORMAT:
            what = f"checkpoint '{checkpoint}' has format {meta['format']}; this version of flax_mlm reads {FORMAT}"
            raise UserError(f"{what}; use the version that saved it, or train again")
        if meta["sha256"] != files.digest(meta):
            raise ValueError("its checksum is not that of its content")
        _check_meta(meta)
    except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError) as e:
        _check_machine(checkpoint, e)
        raise Damaged(f"checkpoint '{checkpoint}': its meta is damaged ({type(e).__name__}: {e})") from e
    return meta


def _check_meta(meta: dict[str, Any]) -> None:
    """Raises ValueError where an entry has a wrong type or value: a checkpoint may come from anyone."""
    counts = {"phase": meta.get("phase", 0)}
    for name, entry in meta.get("cursor", {}).items():
        counts |= entry if isinstance(entry, dict) else {name: entry}
    wrong = [name for name, kind in _TYPES.items() if type(meta[name]) is not kind]
    wrong += [name for name, value in meta.get("environment", {}).items() if type(value) is not str]
    wrong += [name for name, number in meta.get("totals", {}).items() if type(number) not in (int, float)]
    sums = meta.get("sums", {})
    wrong += [name for name, pair in sums.items() if [*map(type, pair)] != [float, int] or pair[1] < 0]
    wrong += [name for name, count in counts.items() if type(count) is not int or count < 0]
    wrong += [name for name, entry in meta["arrays"].items() if [type(x) for x in entry] != [str, list, str]]
    wrong += [f"fine_tuned.{name}" for name in _wrong_of_head(meta.get("fine_tuned", {}))]
    if wrong:
        raise ValueError(f"{wrong[0]} has a wrong type or value")
    if meta["tokenizer"]["filename"] not in TOKENIZERS:
        raise ValueError(f"its tokenizer's file is not one of {', '.join(TOKENIZERS)}")
    base64.b64decode(meta["tokenizer"]["base64"], validate=True)


def _wrong_of_head(about: dict[str, Any]) -> list[str]:
    """Returns the entries of a fine-tuned checkpoint that have a wrong type or value."""
    wrong = ["missing_head"] if type(about.get("missing_head", "")) is not str else []
    if "problem_type" not in about:
        return wrong
    labels, names = about["labels"], ("task", "problem_type", "head", "metric")
    wrong += [name for name in names if type(about[name]) is not str]
    is_list = type(labels) is list and all(type(label) is str for label in labels)
    wrong += [] if is_list and len({*labels}) == len(labels) else ["labels"]
    return wrong + ([] if about["pairs"] in (True, False, None) else ["pairs"])


def _check_machine(checkpoint: epath.Path, e: Exception) -> None:
    """Raises Failure where an error comes from this machine and not from the checkpoint."""
    message = " ".join(str(e).split()) or type(e).__name__
    if isinstance(e, MemoryError) or _NOT_DAMAGE.search(message):
        raise Failure(f"checkpoint '{checkpoint}' cannot be read on this machine; it is kept: {message}") from e


def newest_meta(path: str) -> tuple[epath.Path, dict[str, Any]]:
    """Returns the newest checkpoint that `path` may mean and whose `meta` is sound, and that `meta`.

    Raises:
      UserError: there is none.
    """
    damage = None
    for checkpoint in find_checkpoints(path):
        try:
            return checkpoint, read_meta(checkpoint)
        except Damaged as e:
            damage = damage or e
    assert damage
    raise damage


def stored_config(meta: dict[str, Any]) -> ConfigDict:
    """Returns the config of a checkpoint's last step, that of its phase."""
    config = load.from_dict(meta["config"])
    config.train.phases = ""
    return config


def stored_run(meta: dict[str, Any]) -> dict[str, Any]:
    """Returns the config of the run, with all its phases, as it was saved in a checkpoint."""
    run: dict[str, Any] = meta.get("run", meta["config"])
    return run


def stored_tokenizer(meta: dict[str, Any]) -> Tokenizer:
    """Returns the tokenizer of a checkpoint."""
    name = meta["tokenizer"]["filename"]
    return TOKENIZERS[name](base64.b64decode(meta["tokenizer"]["base64"]), f"the checkpoint's {name}")


def refuse_other_start(what: str, theirs: dict[str, Any], ours: dict[str, Any]) -> None:
    """Compares what a run was trained on and started from, by content: the paths may have changed.

    Args:
      what: the beginning of the message.
      theirs, ours: `meta` of a checkpoint, and of the continuation.

    Raises:
      UserError: the corpus or the weights of `init_from` are others.
    """
    if (a := theirs["corpus"]) != (b := ours["corpus"]):
        counts = [(key, theirs["text"].get(key), ours["text"].get(key)) for key in ours["text"]]
        differences = [f"{key} {old!r}, not {new!r}" for key, old, new in counts if old != new and key != "corpora"]
        if theirs["tokenizer"] != ours["tokenizer"]:
            differences.insert(0, "another tokenizer")
        if (old := _proportions(theirs)) != (new := _proportions(ours)):
            differences.append(f"corpora in the proportions {old or 1}, not {new or 1}")
        how = ", ".join(differences) or "the same number of rows with another content"
        message = f"{what} was trained on corpus {a[:12]}, and this is {b[:12]}: it had {how}"
        raise UserError(f"{message}; give the same text and tokenizer, under any path, or use another --workdir")
    if (a := theirs.get("start", "")) != (b := ours.get("start", "")):
        old, new = (stored_run(meta).get("init_from", "") for meta in (theirs, ours))
        message = f"{what} began with the weights {_weights(a, old) or 'of no folder'}, and init_from has"
        remedy = f"give the same weights, {'init_from=' + old if old.startswith('hf:') else 'under any path'}"
        raise UserError(f"{message} {_weights(b, new) or 'none'}; {remedy}, or use another --workdir")


def _weights(fingerprint: str, path: str) -> str:
    """Names weights by their fingerprint, and where they came from the hub by their name and commit."""
    return fingerprint[:12] + f" ({path})" * path.startswith("hf:")


def _proportions(meta: dict[str, Any]) -> str:
    """Formats the fractions of the rows that the corpora of a mixture give; empty for one corpus."""
    return ":".join(f"{corpus['fraction']:.3g}" for corpus in meta["text"].get("corpora", {}).values())


def split_state(state: Any) -> dict[str, Any]:
    """Splits a TrainState into the items that are saved apart: `params`, `rest` and, where there is one, `average`."""
    rest = state._asdict()
    average = rest.pop("average", None)
    items = {"params": state.params, "rest": {**rest, "params": None}}
    return items if average is None else {**items, "average": average}


def restore(checkpoint: epath.Path, meta: dict[str, Any], abstract: dict[str, Any]) -> dict[str, Any]:
    """Restores some items of a checkpoint, and compares every array with its fingerprint.

    Args:
      checkpoint: its folder.
      meta: from `read_meta`.
      abstract: by item ("params", "average", "rest"), a tree of shapes, dtypes and shardings.

    Raises:
      UserError: the checkpoint has other arrays than `abstract`; raised before any is read.
      Damaged: it cannot be read, or an array differs from what was saved.
      Failure: it cannot be read on this machine now.
    """
    from flax_mlm.checkpoint.fingerprint import leaves

    stored = {name: entry for name, entry in meta["arrays"].items() if name.split("/")[0] in abstract}
    expected = {name: [str(x.dtype), list(x.shape)] for name, x in leaves(abstract).items()}
    for name in sorted(stored.keys() | expected.keys()):
        ours, theirs = expected.get(name), stored[name][:2] if name in stored else None
        if ours != theirs:
            raise UserError(f"checkpoint '{checkpoint}' has {name} {_shape(theirs)}; this config has {_shape(ours)}")
    items = _read_items(checkpoint, abstract)
    _compare(checkpoint, meta, leaves(items))
    return items


def read_back(checkpoint: epath.Path, abstract: dict[str, Any]) -> None:
    """Reads a new checkpoint as a restart would: its meta, the shapes of all arrays, and of each item the smallest
    array and the largest of at most `_READ_BACK_BYTES`.

    Args:
      abstract: as for `restore`.

    Raises:
      Damaged: a part is missing, or differs from what was saved.
      Failure: it cannot be read on this machine now.
    """
    import jax
    import orbax.checkpoint as ocp

    from flax_mlm.checkpoint.fingerprint import leaves

    meta, few = read_meta(checkpoint), set[str]()
    for item, tree in abstract.items():
        stored = _stored_arrays(checkpoint, item)
        for name, x in (named := leaves({item: tree})).items():
            found = stored.get(name.removeprefix(f"{item}/"))
            if found is None or (found.shape, found.dtype) != (x.shape, x.dtype):
                raise Damaged(f"checkpoint '{checkpoint}': {name} is not there as it was saved")
        sizes = {name: x.size * x.dtype.itemsize for name, x in named.items()}
        small = [name for name in sorted(sizes, key=sizes.__getitem__) if sizes[name] <= _READ_BACK_BYTES]
        few |= {*small[:1], *small[-1:]}
    picked = [x if name in few else ocp.PLACEHOLDER for name, x in leaves(abstract).items()]
    items = _read_items(checkpoint, jax.tree.unflatten(jax.tree.structure(abstract), picked))
    _compare(checkpoint, meta, {name: x for name, x in leaves(items).items() if name in few})


@retrying
def _stored_arrays(checkpoint: epath.Path, item: str) -> dict[str, Any]:
    """Returns shape and dtype of each array of an item, as the files of the array have them."""
    import orbax.checkpoint as ocp

    from flax_mlm.checkpoint.fingerprint import leaves

    with _reading(checkpoint):
        return leaves(ocp.PyTreeCheckpointHandler().metadata(checkpoint / item).tree)


def _compare(checkpoint: epath.Path, meta: dict[str, Any], arrays: dict[str, Any]) -> None:
    """Compares arrays with their fingerprints in `meta`. Raises Damaged."""
    import jax

    from flax_mlm.checkpoint.fingerprint import fingerprints, table

    for name, entry in table(arrays, jax.device_get(fingerprints(arrays))).items():
        if entry != meta["arrays"][name]:
            raise Damaged(f"checkpoint '{checkpoint}': {name} differs from what was saved (a damaged or changed file)")


def _shape(entry: list[Any] | None) -> str:
    return f"as {entry[0]} {tuple(entry[1])}" if entry else "not at all"


@retrying
def _read_items(checkpoint: epath.Path, abstract: dict[str, Any]) -> dict[str, Any]:
    """Reads the arrays of some items, except for those that are `ocp.PLACEHOLDER`."""
    import orbax.checkpoint as ocp

    bound_retries()
    to_args = ocp.checkpoint_utils.construct_restore_args
    args = {item: ocp.args.PyTreeRestore(tree, restore_args=to_args(tree)) for item, tree in abstract.items()}
    with _reading(checkpoint), ocp.Checkpointer(ocp.CompositeCheckpointHandler()) as checkpointer:
        restored = checkpointer.restore(checkpoint, args=ocp.args.Composite(**args))
    return {item: restored[item] for item in abstract}


@contextlib.contextmanager
def _reading(checkpoint: epath.Path) -> Iterator[None]:
    """Turns what orbax raises into Damaged, or into the error of the bucket or of this machine."""
    try:
        yield
    except Exception as e:  # a damaged folder makes orbax raise anything
        if gcs.is_one(checkpoint) and (explained := gcs.explain(checkpoint, e)):
            raise explained from e  # the bucket failed, not the checkpoint
        _check_machine(checkpoint, e)
        message = str(e).splitlines()[0] if str(e) else repr(e)
        raise Damaged(f"checkpoint '{checkpoint}' cannot be read ({message})") from e
