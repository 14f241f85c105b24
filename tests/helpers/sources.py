"""Reading a source as whole documents, and dividing it into ranges of any size."""

import pickle
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager

import numpy as np
import pytest

from flax_mlm.data.sources import base
from flax_mlm.data.sources.base import TextChunk
from flax_mlm.data.sources.open import Options, open_source

_DEFAULTS = Options()


def chunks(spec: str, options: Options = _DEFAULTS) -> tuple[dict[tuple[int, int], list[TextChunk]], Counter[str]]:
    """Chunks of each document, read from units that went through pickle, and the counts."""
    counts: Counter[str] = Counter()
    found: dict[tuple[int, int], list[TextChunk]] = {}
    source = open_source(spec, options)
    source.check()
    for unit in pickle.loads(pickle.dumps(source.units)):
        for chunk in unit.chunks(counts):
            found.setdefault((chunk.unit, chunk.document), []).append(chunk)
    assert counts["read"] == source.size
    return found, +counts


def read(spec: str, options: Options = _DEFAULTS) -> tuple[list[str], Counter[str]]:
    """Whole documents, and the counts that are not 0."""
    found, counts = chunks(spec, options)
    return ["".join(chunk.text for chunk in document) for document in found.values()], counts


def read_ids(spec: str, options: Options) -> list[list[int]]:
    """Ids of whole documents."""
    found, _ = chunks(spec, options)
    return [np.concatenate([chunk.ids for chunk in document]).tolist() for document in found.values()]


@contextmanager
def units_of(size: int) -> Iterator[None]:
    """Divides what is opened inside the block into ranges of so many bytes."""
    with pytest.MonkeyPatch.context() as m:
        m.setattr(base, "UNIT_BYTES", size)
        yield
