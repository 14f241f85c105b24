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
    about = info.splits[split]
    licence = " ".join((info.redistribution_info.license or "").split()) or f"not stated; see {info.homepage}"
    units = grouped([Range("", about.num_bytes, functools.partial(_read, spec, name, field))])
    version = [info.full_name, split, about.num_examples]
    return Source(f"{info.full_name}:{split} (TensorFlow Datasets)", licence, version, units)


@functools.cache
def _builder(spec: str, name: str) -> tuple[Any, str]:
    return prepared_tfds(f"data.source is '{spec}'", name)


def _read(spec: str, name: str, field: str, counts: Counter[str]) -> Iterator[tuple[int, str]]:
    builder, split = _builder(spec, name)
    import tensorflow_datasets as tfds

    decoders = tfds.decode.PartialDecoding({field: True})
    for number, example in enumerate(builder.as_dataset(split=split, decoders=decoders).as_numpy_iterator()):
        for text in document_chunks(decode(example[field], counts), counts):
            yield number, text
        counts["read"] += len(example[field])
