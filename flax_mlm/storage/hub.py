"""Models of the Hugging Face Hub, `hf:ORG/NAME[@revision]`, as folders of its cache.

Only functions import `huggingface_hub`, since it is slow to import. Its variables apply: HF_HOME, HF_ENDPOINT,
HF_HUB_OFFLINE, HF_TOKEN and the others.
"""

import contextlib
import functools
import os
import re
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

from flax_mlm.errors import Failure, Preempted, UserError

_TIMEOUT = 10  # seconds for the first request
_COMMIT = "[0-9a-f]{40}"
_NAME = r"[A-Za-z0-9][\w.-]*(/[A-Za-z0-9][\w.-]*)?"
_TEXTS = ("*.json", "*.txt", "*.model")
_TENSORS = ("model.safetensors", "*-of-*.safetensors")
_NEVER = ("*.bin", "*.pt", "*.pth", "*.ckpt", "*.pkl", "*.pickle", "*.h5", "*.msgpack")  # pickles, and other programs'
_OTHERS = ("*/*.safetensors", "onnx/*", "openvino/*", "coreml/*", "original/*", "runs/*", "checkpoint-*/*")
_ENDINGS = (".bin", ".pt", ".pth", ".ckpt", ".pkl", ".safetensors", ".h5", ".msgpack", ".onnx", ".gguf", ".ot")
_READABLE = "set HF_TOKEN to a token that may read it, after you have accepted its terms on its page"


class HubName(NamedTuple):
    """A model of the hub, at a branch, a tag or a commit; empty: at its default branch."""

    repository: str
    revision: str = ""

    def __str__(self) -> str:
        return f"hf:{self.repository}" + f"@{self.revision}" * bool(self.revision)

    @property
    def is_pinned(self) -> bool:
        """Returns whether the revision is a commit, whose files never change."""
        return re.fullmatch(_COMMIT, self.revision) is not None


def parse(field: str, path: str | os.PathLike[str]) -> HubName | None:
    """Reads `hf:ORG/NAME[@revision]`; None for any other path, and where a file or folder has that very name.

    Raises:
      UserError: it begins with `hf:`, and is no name that the hub may have.
    """
    text = os.fspath(path)
    if not text.startswith("hf:") or os.path.exists(text):
        return None
    match = re.fullmatch(rf"hf:(?P<repository>{_NAME})(@(?P<revision>[\w.][\w./-]*))?", text)
    if not match:
        raise UserError(f"{field} is '{text}'; expected hf:ORG/NAME or hf:ORG/NAME@REVISION, as the hub spells them")
    return HubName(match["repository"], match["revision"] or "")


def pin(field: str, path: str, weights: bool = True) -> str:
    """Downloads a model and returns its name with the commit; any other path as it is. See `local`."""
    name = parse(field, path)
    if name is None or name.is_pinned:
        return path
    return str(name._replace(revision=_download(field, name, weights).name))


def local(field: str, path: str | os.PathLike[str], weights: bool = True) -> str:
    """Returns the folder of a model in the cache, downloaded if it is not there; any other path as it is.

    A commit that the cache has is used without a request. Pickles are never downloaded.

    Args:
      field: what names the model, for errors.
      weights: safetensors files are wanted, too, besides those of configs and tokenizers.

    Raises:
      UserError: the hub has no such model or revision, does not let this user read it, or does not answer; it has no
        safetensors; or offline, the cache does not have it.
    """
    name = parse(field, path)
    return os.fspath(path) if name is None else str(_download(field, name, weights))


def _download(field: str, name: HubName, weights: bool) -> Path:
    hub = library(f"{field} is '{name}', which")
    patterns = {"allow_patterns": [*_TEXTS, *(_TENSORS if weights else ())], "ignore_patterns": [*_NEVER, *_OTHERS]}
    arguments = {"repo_id": name.repository, "revision": name.revision or None, **patterns}
    with naming(f"{field} is '{name}'"):
        if is_offline() or (name.is_pinned and _is_listed(name)):
            with contextlib.suppress(*([] if is_offline() else [hub.errors.LocalEntryNotFoundError])):
                return _cached(hub, name, arguments)
        _check_content(field, name, weights)
        return Path(hub.snapshot_download(**arguments))


def _cached(hub: Any, name: HubName, arguments: dict[str, Any]) -> Path:
    """Returns the folder in the cache. Raises UserError, or LocalEntryNotFoundError where files are missing."""
    try:
        folder = Path(hub.snapshot_download(**arguments, local_files_only=True))
    except hub.errors.LocalEntryNotFoundError as e:
        if not is_offline():
            raise
        what = "not all of it is" if "ncomplete" in type(e).__name__ else "it is not"
        remedy = "unset HF_HUB_OFFLINE, or run once where there is a network, with the same HF_HOME"
        where = f"{what} in the cache ({hub.constants.HF_HUB_CACHE}), and offline nothing else is read"
        raise UserError(f"{name} cannot be read: {where}; {remedy}") from None
    if not _is_listed(name._replace(revision=folder.name)):
        _note(f"note: {name}: another program filled the cache; what it has not downloaded is unknown")
    return folder


@functools.cache
def _note(line: str) -> None:
    """Prints a line, once."""
    print(line, file=sys.stderr)


def _is_listed(name: HubName) -> bool:
    """Returns whether the cache knows which files a commit has, so that a missing one is noticed."""
    folder = "--".join(["models", *name.repository.split("/")])
    return Path(library(str(name)).constants.HF_HUB_CACHE, folder, "trees", f"{name.revision}.json").is_file()


def _check_content(field: str, name: HubName, weights: bool) -> None:
    """Asks the hub what a model has. Raises UserError where it, its revision or its safetensors do not exist."""
    hub = library(str(name))
    api = hub.HfApi()
    try:
        info = api.model_info(name.repository, revision=name.revision or None, timeout=_TIMEOUT)
    except hub.errors.RevisionNotFoundError:
        refs = api.list_repo_refs(name.repository)
        known = ", ".join(ref.name for ref in [*refs.branches, *refs.tags])
        has = f"'{name.repository}' has no revision '{name.revision}'; it has {known}, and commits"
        raise UserError(f"{field} is '{name}'; {has}") from None
    files = [file.rfilename for file in info.siblings or () if "/" not in file.rfilename]
    if weights and not {"model.safetensors", "model.safetensors.index.json"} & {*files}:
        found = ", ".join(file for file in files if file.endswith(_ENDINGS)) or "no weights"
        remedy = "name a revision that has it, such as @refs/pr/1, or convert it where a pickle can do no harm"
        problem = f"it has no model.safetensors, but {found}; only safetensors are read, since pickles can run code"
        raise UserError(f"{field} is '{name}'; {problem}; {remedy}")


@functools.cache
def library(what: str) -> Any:
    """Imports `huggingface_hub`, and silences all of it but the progress of downloads on a terminal.

    Args:
      what: the beginning of the error.

    Raises:
      UserError: it is missing.
    """
    try:
        import huggingface_hub
        import huggingface_hub.errors
        import huggingface_hub.utils
    except ImportError as e:
        raise UserError(f"{what} needs a package: pip install huggingface_hub ({e})") from e
    huggingface_hub.utils.logging.set_verbosity(huggingface_hub.utils.logging.CRITICAL)
    if not sys.stderr.isatty():
        huggingface_hub.utils.disable_progress_bars()
    return huggingface_hub


def is_offline() -> bool:
    """Returns whether HF_HUB_OFFLINE is set."""
    return bool(library("hf:... ").constants.HF_HUB_OFFLINE)


@contextlib.contextmanager
def naming(what: str) -> Iterator[None]:
    """Turns whatever `huggingface_hub` raises into a UserError that begins with `what`.

    It has no cause: a connection that timed out is no error of a file server, which `retrying` waits for.
    """
    try:
        yield
    except (UserError, Failure, Preempted):
        raise
    except Exception as e:
        raise UserError(f"{what}; {_explained(e)}") from None


def _explained(error: BaseException) -> str:
    hub = library("hf:... ")
    endpoint, causes = hub.constants.ENDPOINT, chain(error)
    status = {getattr(getattr(e, "response", None), "status_code", None) for e in causes}
    if any(isinstance(e, hub.errors.GatedRepoError) for e in causes):
        return f"{endpoint} does not let you read it, since it is gated; {_READABLE}"
    if any("Invalid credentials" in str(e) or "Invalid user token" in str(e) for e in causes):
        return f"{endpoint} refuses the token; set HF_TOKEN to a valid one, or unset it"
    if any(isinstance(e, hub.errors.RepositoryNotFoundError) for e in causes) or status & {401, 404}:
        return f"{endpoint} has no such model that you may read; check the name, or set HF_TOKEN if it is private"
    if 403 in status:
        return f"{endpoint} does not allow it ({first_line(error)}); set HF_TOKEN to a token that may do it"
    if any(is_network(e) for e in causes):
        remedy = "check the network and HF_ENDPOINT, and run again; HF_HUB_OFFLINE=1 reads the cache"
        return f"{endpoint} does not answer ({first_line(causes[-1])}); {remedy}"
    return f"the hub or its cache cannot be used: {type(error).__name__}: {first_line(error)}"


def chain(error: BaseException) -> list[BaseException]:
    """Lists an exception, what it was raised from, and so on."""
    errors = [error]
    while (cause := errors[-1].__cause__ or errors[-1].__context__) and cause not in errors:
        errors.append(cause)
    return errors


def is_network(error: BaseException) -> bool:
    """Returns whether an exception is about a connection, or a server that fails."""
    # by name: they are of requests, httpx or httpx2, as the version of huggingface_hub is
    names = {kind.__name__ for kind in type(error).__mro__}
    status = getattr(getattr(error, "response", None), "status_code", 0) or 0
    return bool(names & {"TransportError", "ConnectionError", "TimeoutError", "OfflineModeIsEnabled"}) or status >= 500


def first_line(error: BaseException) -> str:
    """Returns the first line of an exception's message, or its type."""
    return (str(error).strip() or type(error).__name__).splitlines()[0]
