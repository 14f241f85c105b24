"""Folders that `data.corpus` names: as they are written, or by patterns such as `corpora/*`."""

import glob
import os
import re
from collections.abc import Callable
from pathlib import Path

from flax_mlm.config.schema import DataConfig
from flax_mlm.data.corpus import MANIFEST
from flax_mlm.errors import UserError
from flax_mlm.storage import bucket_sources, buckets, files

_MAGIC = re.compile(r"[*?\[]")


def corpus_folders(data: DataConfig, log: Callable[[str], None]) -> dict[str, str]:
    """Lists the corpora of `data.corpus`: folder or URL -> weight as written, see `DataConfig.folders`.

    A pattern stands for the corpora that it matches, sorted by name. A folder of exactly that name goes first.

    Args:
      log: called with a line about folders that a pattern matches and that are no corpora.

    Raises:
      UserError: also where a pattern matches no corpus, or has a weight.
    """
    result: dict[str, str] = {}
    folders = data.folders(_is_folder)
    for path, weight in folders.items():
        if not _MAGIC.search(path) or _is_folder(path):
            result[path] = weight
            continue
        if weight:
            what = f"data.corpus: '{path}' is a pattern with a weight, {weight}"
            raise UserError(f"{what}; name each folder with its weight, or weight them by data.sampling_alpha")
        corpora = _in_bucket(path) if "://" in path else _on_disk(path, log)
        if twice := [folder for folder in corpora if folder in folders or folder in result]:
            raise UserError(f"data.corpus: '{twice[0]}' is matched by '{path}' and named twice so; name it once")
        result |= dict.fromkeys(corpora, "")
    return result


def _is_folder(path: str) -> bool:
    """Returns whether there is a folder, or in a bucket a corpus, of exactly this name."""
    if not buckets.is_one(path) or path.count("://") > 1:
        return os.path.isdir(os.path.expanduser(path))
    if _MAGIC.search(path):  # which no name in a bucket may have
        return False
    folder = buckets.parse("data.corpus", path)
    assert folder
    return files.exists(folder / MANIFEST)


def _on_disk(pattern: str, log: Callable[[str], None]) -> list[str]:
    """Finds the local corpora that match a pattern; a parent folder that exists as it is written stands for itself."""
    path = Path(os.path.expanduser(pattern))
    literal = next((p for p in path.parents if p.exists()), Path())
    matches = glob.glob(str(Path(glob.escape(str(literal)), path.relative_to(literal))), recursive=True)
    folders = sorted(path for path in matches if os.path.isdir(path))
    corpora = [path for path in folders if os.path.isfile(os.path.join(path, MANIFEST))]
    if not corpora:
        raise _nothing(pattern, f" (from {os.getcwd()})")
    if others := [path for path in folders if path not in corpora]:
        what = f"{', '.join(others[:3])}{f' and {len(others) - 3} more' * (len(others) > 3)}"
        log(f"note: data.corpus: '{pattern}' also matches {what}, without {MANIFEST}: no corpora, and not read")
    return corpora


def _in_bucket(pattern: str) -> list[str]:
    """Finds the corpora in a bucket that match a pattern."""
    found = bucket_sources.find("data.corpus", f"{pattern.rstrip('/')}/{MANIFEST}")
    if not found:
        raise _nothing(pattern)
    return [each.url.removesuffix(f"/{MANIFEST}") for each in found]


def _nothing(pattern: str, where: str = "") -> UserError:
    expected = f"expected folders made by `python -m flax_mlm.prepare`, which hold {MANIFEST}"
    return UserError(f"data.corpus: '{pattern}' matches no corpus{where}; {expected}")
