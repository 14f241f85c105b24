"""The package `datasets`, its cache and the hub, as far as sources use them, with errors of one line.

Only functions import the package: it is optional, and slow to import.
"""

import contextlib
import functools
import json
import re
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

from flax_mlm.data.sources import base
from flax_mlm.errors import Failure, Preempted, UserError
from flax_mlm.storage import hub

_TIMEOUT = 10  # seconds for the first request
_READ_RETRIES = 2  # of `datasets`; each comes after half a minute of those of huggingface_hub
_COMMIT = "[0-9a-f]{40}"
_TOKEN = "set HF_TOKEN to a token that may read it, after you have accepted its terms on its page"
_CONVERTED = "read the hub's Parquet copy (revision=refs/convert/parquet), or save_to_disk it elsewhere (hf:FOLDER)"


class Commit(NamedTuple):
    """A dataset of the hub at a time."""

    commit: str
    licence: str


class Cached(NamedTuple):
    """A config in the cache of `datasets`."""

    config: str
    commit: str  # or a hash of what it was made of
    folder: Path


@functools.cache
def library() -> Any:
    """Imports `datasets`, and silences it. Raises UserError where it is missing."""
    try:
        import datasets
        import huggingface_hub
    except ImportError as e:
        raise UserError(f"data.source is hf:..., which needs a package: pip install 'datasets>=5' ({e})") from e
    if int(datasets.__version__.split(".")[0]) < 5:
        raise UserError(f"datasets is {datasets.__version__}; expected 5 or later: pip install 'datasets>=5'")
    datasets.logging.set_verbosity(datasets.logging.CRITICAL)
    datasets.disable_progress_bars()
    huggingface_hub.utils.logging.set_verbosity(huggingface_hub.utils.logging.CRITICAL)
    huggingface_hub.utils.disable_progress_bars()
    datasets.config.STREAMING_READ_MAX_RETRIES = _READ_RETRIES
    return datasets


@contextlib.contextmanager
def naming(spec: str) -> Iterator[None]:
    """Turns whatever `datasets` and what it uses raise into a UserError that names the source."""
    try:
        yield
    except (UserError, Failure, Preempted):
        raise
    except Exception as e:
        raise UserError(f"data.source is '{spec}'; {_explained(e)}") from e


def _explained(error: BaseException) -> str:
    chain = hub.chain(error)
    status = {getattr(getattr(e, "response", None), "status_code", None) for e in chain}
    if status & {401, 403} or any("gated" in str(e) for e in chain):
        return f"{_endpoint()} does not let you read it, since it is gated or private; {_TOKEN}"
    if any("scripts are no longer supported" in str(e) for e in chain):
        return f"it is a script, which datasets no longer runs; {_CONVERTED}"
    if any(hub.is_network(e) for e in chain):
        remedy = "check the network and HF_ENDPOINT, and run again; HF_HUB_OFFLINE=1 reads the cache of datasets"
        return f"{_endpoint()} does not answer ({hub.first_line(chain[-1])}); {remedy}"
    what = f"it cannot be read: {type(error).__name__}: {hub.first_line(error)}"
    return f"{what}; if its files are damaged or incomplete, copy or download them again"


def _endpoint() -> str:
    return library().config.HF_ENDPOINT


def is_name(text: str) -> bool:
    """Returns whether text may be the name of a dataset: NAME or ORG/NAME."""
    return re.fullmatch(r"[\w-][\w.-]*(/[\w-][\w.-]*)?", text) is not None


def is_offline() -> bool:
    """Returns whether HF_HUB_OFFLINE or HF_DATASETS_OFFLINE is set."""
    import huggingface_hub

    return bool(library().config.HF_HUB_OFFLINE or huggingface_hub.constants.HF_HUB_OFFLINE)


def resolve(spec: str, dataset: str, revision: str) -> Commit:
    """Asks the hub for the commit of a branch or tag. Raises UserError."""
    import huggingface_hub
    from huggingface_hub.errors import GatedRepoError, RepositoryNotFoundError, RevisionNotFoundError

    api = huggingface_hub.HfApi(endpoint=_endpoint())
    prefix = f"data.source is '{spec}'; "
    with naming(spec):
        try:
            info = api.dataset_info(dataset, revision=revision or None, timeout=_TIMEOUT)
        except RevisionNotFoundError as e:
            refs = api.list_repo_refs(dataset, repo_type="dataset")
            known = ", ".join(ref.name for ref in [*refs.branches, *refs.tags])
            raise UserError(f"{prefix}it has no revision '{revision}'; it has {known}, and commits") from e
        except huggingface_hub.errors.HfHubHTTPError as e:
            is_missing = isinstance(e, RepositoryNotFoundError) or e.response.status_code in (401, 404)
            if not is_missing or isinstance(e, GatedRepoError):
                raise
            remedy = "check the name, or set HF_TOKEN if it is private"
            raise UserError(f"{prefix}{_endpoint()} has no dataset '{dataset}' that you may read; {remedy}") from e
    licence = (info.card_data.get("license") if info.card_data else None) or "not stated; that of the dataset"
    return Commit(str(info.sha), ", ".join(licence) if isinstance(licence, list) else str(licence))


def open_config(spec: str, dataset: str, config: str, commit: str) -> Any:
    """Opens a config of a dataset of the hub, as a builder; empty: its default. Raises UserError."""
    with naming(spec):
        try:
            return builder(dataset, config, commit)
        except ValueError:
            known = library().get_dataset_config_names(dataset, revision=commit)
            if config in known or (not config and len(known) == 1):
                raise
    raise _no_config(spec, config, known)


def _no_config(spec: str, config: str, known: list[str]) -> UserError:
    what = f"it has no config '{config}'" if config else "it has several configs"
    return UserError(f"data.source is '{spec}'; {what}; it has {', '.join(known)}; name one: ?config={known[0]}")


def builder(dataset: str, config: str, commit: str) -> Any:
    """Opens a config of a dataset of the hub."""
    return library().load_dataset_builder(dataset, config or None, revision=commit)


def is_parquet(builder: Any) -> bool:
    """Returns whether the data files are Parquet."""
    return type(builder.config).__name__ == "ParquetConfig"


def sizes(files: Iterable[str]) -> list[int]:
    """Returns the sizes of data files, in bytes; of those that are not on the hub, that of a unit."""
    import huggingface_hub

    system = huggingface_hub.HfFileSystem(endpoint=_endpoint())
    return [system.info(file)["size"] if file.startswith("hf://") else base.UNIT_BYTES for file in files]


def find_cached(spec: str, dataset: str, config: str, revision: str) -> Cached:
    """Finds a config in the cache, which may have several and several commits of each. Raises UserError."""
    import huggingface_hub

    root = library().config.HF_DATASETS_CACHE
    prefix = f"data.source is '{spec}'; "
    all_of_it = list(_all_cached(Path(root), dataset))
    if not all_of_it:
        remedy = f"run datasets.load_dataset('{dataset}') once on a machine with a network, or unset HF_HUB_OFFLINE"
        raise UserError(f"{prefix}it is not in the cache ({root}), and offline nothing else is read; {remedy}")
    configs = sorted({each.config for each in all_of_it})
    default = configs[0] if len(configs) == 1 else "default" if "default" in configs else None
    config = config or default or ""
    if config not in configs:
        raise _no_config(spec, config, configs)
    commits = {each.commit: each for each in all_of_it if each.config == config}
    commit = revision or "main"
    if not re.fullmatch(_COMMIT, commit):
        name = "--".join(["datasets", *dataset.split("/")])
        ref = Path(huggingface_hub.constants.HF_HUB_CACHE, name, "refs", commit)
        commit = ref.read_text().strip() if ref.is_file() else commit
    if not revision and commit not in commits and len(commits) == 1:
        return next(iter(commits.values()))
    if commit not in commits:
        known = f"the cache ({root}) has {', '.join(sorted(commits))}"
        raise UserError(
            f"{prefix}offline, revision '{revision or 'main'}' is unknown; {known}; name one: ?revision=..."
        )
    return commits[commit]


def _all_cached(root: Path, dataset: str) -> Iterator[Cached]:
    from datasets.naming import camelcase_to_snakecase

    *org, name = dataset.split("/")
    for file in root.glob("___".join([*org, camelcase_to_snakecase(name)]) + "/*/*/*/dataset_info.json"):
        config = json.loads(file.read_text()).get("config_name") or file.parts[-4]
        yield Cached(config, file.parts[-2], file.parent)


@functools.cache
def open_cached(folder: Path) -> Any:
    """Opens a config in the cache."""
    from datasets.packaged_modules.cache.cache import Cache

    dataset, config, version, commit = folder.parts[-4:]
    name = dataset.replace("___", "/", 1)
    known = library().DatasetInfo.from_directory(str(folder)).dataset_name
    return Cache(
        cache_dir=str(folder.parents[3]),
        dataset_name=known or name.rpartition("/")[2],
        repo_id=name if "/" in name else None,
        config_name=config,
        version=version,
        hash=commit,
    )
