"""Documents from datasets that TensorFlow Datasets has prepared."""

import functools
from collections import Counter
from collections.abc import Iterator
from typing import Any

from flax_mlm.data.sources.base import Range, Source, grouped
from flax_mlm.data.sources.columns import document_chunks
from flax_mlm.data.text import decode
from flax_mlm.data.tf import prepared_tfds
from flax_mlm.errors import UserError


def open_tfds(spec: str, name: str) -> Source:
    """Opens NAME[/config][:version][:split]. Raises UserError."""
    builder, split = _builder(spec, name)
    import tensorflow_datasets as tfds

    info = builder.info
    text_features = [k for k, f in info.features.items() if isinstance(f, tfds.features.Text)]
    field = "text" if "text" in text_features else text_features[0] if len(text_features) == 1 else None
    if not field:
        raise UserError(f"data.source is '{spec}'; none of {', '.join(info.features)} is clearly the text")
    licence = " ".join((info.redistribution_info.license or "").split()) or f"not stated; see {info.homepage}"
    parts = list(_parts(info.splits, split))
    units = grouped(Range("", size, functools.partial(_read, spec, name, part, field)) for part, size in parts)
    version = [info.full_name, split, info.splits[split].num_examples, [part for part, _ in parts]]
    return Source(f"{info.full_name}:{split} (TensorFlow Datasets)", licence, version, units)


def _parts(splits: Any, split: str) -> Iterator[tuple[str, int]]:
    """Divides a split, also one such as `train[:10%]+test`, between its files: (NAME[from:to], bytes)."""
    from tensorflow_datasets.core.splits import AbstractSplit

    for whole in AbstractSplit.from_spec(split).to_absolute(splits):
        about = splits[whole.splitname]
        begin, end = whole.from_ or 0, about.num_examples if whole.to is None else whole.to
        first = 0
        for length in about.shard_lengths:
            start, stop = max(begin, first), min(end, first + length)
            first += length
            if start < stop:
                yield f"{whole.splitname}[{start}:{stop}]", about.num_bytes * (stop - start) // about.num_examples


@functools.cache
def _builder(spec: str, name: str) -> tuple[Any, str]:
    return prepared_tfds(f"data.source is '{spec}'", name)


def _read(spec: str, name: str, split: str, field: str, counts: Counter[str]) -> Iterator[tuple[int, str]]:
    builder, _ = _builder(spec, name)
    import tensorflow_datasets as tfds

    decoders = tfds.decode.PartialDecoding({field: True})
    dataset = builder.as_dataset(split=split, decoders=decoders)
    for number, example in enumerate(dataset.as_numpy_iterator()):
        for text in document_chunks(decode(example[field], counts), counts):
            yield number, text
        counts["read"] += len(example[field])
