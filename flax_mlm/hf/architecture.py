"""What it takes to describe an architecture of `transformers`, and its weights turned into ours and back.

An architecture is data: which fields of our config are which of its `config.json`, what both must be besides, and a
table of weights. The same table serves reading and writing.
"""

import dataclasses
import itertools
from collections.abc import Callable, Iterator, Mapping
from typing import Any, NamedTuple

import numpy as np

# How an array of ours becomes theirs. What a row of a table names is a module, except for `Array`.
Array = "array"  # one array, as it is
Norm = "norm"  # scale, bias -> weight, bias
Linear = "linear"  # kernel (inputs, outputs), bias -> weight (outputs, inputs), bias; split where they have several
Offset = "offset"  # one array, whose first rows, up to the padding id's, they have and never use

_SUFFIXES = {"kernel": ".weight", "scale": ".weight", "bias": ".bias"}


class Row(NamedTuple):
    """A module or array of ours, the names of theirs, and how one becomes the other. `{}` stands for the number of a
    layer, and `a|b` at the end of a name for two that are one of ours."""

    ours: str
    theirs: str
    transform: str


@dataclasses.dataclass(frozen=True)
class Architecture:
    """One architecture.

    Attributes:
      name: how --architecture calls it.
      model_type: of its config.json.
      class_name: the class of transformers for our objective.
      objective: mlm, clm or rtd.
      base: what the names of a model without head lack in front.
      fields: field of `ModelConfig` -> key of config.json, or several that must be alike, with `|` between.
      training: the same, for what a training is free to choose; not read, only written.
      ours: what else our config must have.
      theirs: what else their config must have; the first of the values is their default and is written.
      rows: the weights.
      same: their names of weights that must equal another.
      unused: beginnings of their names of weights for which our model has no place: poolers, heads of other tasks.
      more: key of config.json -> by how much it is more than our field.
      normalise: a config.json with the keys named here.
      defaults: of those keys, where a config.json leaves them out.
    """

    name: str
    model_type: str
    class_name: str
    objective: str
    base: str
    fields: Mapping[str, str]
    training: Mapping[str, str]
    ours: Mapping[str, Any]
    theirs: Mapping[str, tuple[Any, ...]]
    rows: tuple[Row, ...]
    same: Mapping[str, str]
    unused: tuple[str, ...]
    more: Mapping[str, int]
    normalise: Callable[[dict[str, Any]], dict[str, Any]]
    defaults: Mapping[str, Any]


class ParamMapping(NamedTuple):
    """Where one leaf of our parameters is in their file."""

    path: tuple[str, ...]
    shape: tuple[int, ...]
    dims: str  # letters of the dimensions, without that of the layers
    names: list[list[str]]  # theirs, by layer and part
    transform: str

    @property
    def stacked(self) -> bool:
        """Whether there is a leading dimension of layers."""
        return len(self.shape) > len(self.dims)

    @property
    def num_inputs(self) -> int:
        """Dimensions of a kernel that are inputs."""
        return 1 if self.dims[0] in "DFE" else len(self.dims) - 1


def places(architecture: Architecture, model: Any, num_layers: int) -> Iterator[ParamMapping]:
    """For every leaf of a `heads.Model`, where it is in their file.

    Raises:
      KeyError: the table has no row for it.
    """
    import jax  # not at the top: a config error should not wait for it

    rows = {row.ours: row for row in architecture.rows}
    abstract = jax.eval_shape(model.init, jax.random.key(0))
    dims = dict(_flatten(model.dims))
    for path, leaf in _flatten(abstract):
        suffix = _SUFFIXES.get(path[-1], "")
        row = rows["/".join(path[:-1] if suffix else path)]
        stacked = len(leaf.shape) > len(dims[path])
        first, *more = row.theirs.split("|")
        stem = first.rpartition(".")[0]
        parts = [first, *(f"{stem}.{name}" for name in more)]
        # Where they have fewer than all layers, the first ones lack it.
        layers = range(num_layers - leaf.shape[0], num_layers) if stacked and "{}" in first else [0]
        names = [[part.format(layer) + suffix for part in parts] for layer in layers]
        yield ParamMapping(path, leaf.shape, dims[path], names, row.transform)


def _flatten(tree: Mapping[str, Any], prefix: tuple[str, ...] = ()) -> Iterator[tuple[tuple[str, ...], Any]]:
    for name, value in tree.items():
        if isinstance(value, Mapping):
            yield from _flatten(value, (*prefix, name))
        else:
            yield (*prefix, name), value


def to_theirs(where: list[ParamMapping], params: Any, offset: int) -> dict[str, np.ndarray]:
    """Our parameters under their names.

    Args:
      where: see `places`.
      params: nested dicts of arrays.
      offset: rows of theirs that an `Offset` array begins with.
    """
    leaves, tensors = dict(_flatten(params)), {}
    for place in where:
        leaf = np.asarray(leaves[place.path])
        for layer, names in zip(leaf if place.stacked else [leaf], place.names, strict=True):
            if place.transform == Linear:
                if place.path[-1] == "kernel":
                    layer = layer.reshape(int(np.prod(layer.shape[: place.num_inputs])), -1).T
                else:
                    layer = layer.reshape(-1)
            elif place.transform == Offset:
                layer = np.concatenate([np.zeros((offset, layer.shape[1]), layer.dtype), layer])
            for name, part in zip(names, np.split(layer, len(names)), strict=True):
                tensors[name] = np.ascontiguousarray(part)
    return tensors


def to_ours(
    where: list[ParamMapping], tensors: Mapping[str, np.ndarray], offset: int
) -> dict[tuple[str, ...], np.ndarray]:
    """Their weights as our parameters by path, float32. Those whose weights are not there are left out.

    Raises:
      ValueError: one has another shape than ours needs; the message names it.
    """
    params = {}
    for place in where:
        if not all(name in tensors for name in itertools.chain(*place.names)):
            continue
        layers = []
        for names in place.names:
            layer = np.concatenate([np.asarray(tensors[name], np.float32) for name in names])
            if place.transform == Linear and place.path[-1] == "kernel":
                layer = layer.T
            elif place.transform == Offset:
                layer = layer[offset:]
            wanted = place.shape[1:] if place.stacked else place.shape
            if layer.size != np.prod(wanted) or (place.transform != Linear and layer.shape != tuple(wanted)):
                shapes = ", ".join(str(tuple(tensors[name].shape)) for name in names)
                raise ValueError(f"{names[0]} has shape {shapes}; the config needs {tuple(wanted)}")
            layers.append(layer.reshape(wanted))
        params[place.path] = np.stack(layers) if place.stacked else layers[0]
    return params
