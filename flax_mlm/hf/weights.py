"""Conversion between our parameters and the weights of a Hugging Face folder, as numpy arrays."""

from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np
from flax.traverse_util import flatten_dict

from flax_mlm.data.tokenizer import Tokenizer
from flax_mlm.errors import UserError, as_user_error
from flax_mlm.hf.architecture import Architecture, Layout, position_offset
from flax_mlm.hf.folder import Folder

Path = tuple[str, ...]  # keys that lead to a parameter
Params = dict[Path, np.ndarray]
Log = Callable[[str], None]

_DTYPES = ("float32", "float16", "bfloat16", "float64")
_SUFFIXES = {"kernel": ".weight", "scale": ".weight", "bias": ".bias"}


class MissingHead(UserError):
    """A folder has no vocabulary head, which vectors and fine-tuning do not need."""


class ParamMapping(NamedTuple):
    """Location of one of our parameters in a file of weights."""

    path: Path
    shape: tuple[int, ...]
    dims: str  # letters of the dimensions, without that of the layers
    names: list[list[str]]  # by layer, the tensors that are concatenated
    layout: Layout

    @property
    def is_stacked(self) -> bool:
        """Returns whether the first dimension is that of the layers."""
        return len(self.shape) > len(self.dims)


def param_mappings(architecture: Architecture, shapes: Any, dims: Any, num_layers: int) -> Iterator[ParamMapping]:
    """Yields the location of every parameter of a model.

    Args:
      shapes: tree of the parameters, or of anything else with a shape.
      dims: tree of the letters of their dimensions (`Model.dims`).
      num_layers: number of the model's layers.

    Raises:
      KeyError: the weight table has no row for a parameter.
    """
    rules = {rule.param: rule for rule in architecture.weights}
    letters = flatten_dict(dims)
    for path, leaf in flatten_dict(shapes).items():
        suffix = _SUFFIXES.get(path[-1], "")
        rule = rules["/".join(path[:-1] if suffix else path)]
        is_stacked = len(leaf.shape) > len(letters[path])
        # Where fewer layers than all have a module, it is the first ones that lack it.
        layers = range(num_layers - leaf.shape[0], num_layers) if is_stacked and "{}" in rule.names[0] else [0]
        names = [[name.format(layer) + suffix for name in rule.names] for layer in layers]
        yield ParamMapping(path, leaf.shape, letters[path], names, rule.layout)


def params_to_tensors(mappings: Sequence[ParamMapping], params: Any, offset: int) -> dict[str, np.ndarray]:
    """Converts parameters to weights by name.

    Args:
      mappings: from `param_mappings`.
      params: nested dicts of arrays.
      offset: unused rows at the beginning of a tensor with `Layout.OFFSET`.
    """
    leaves, tensors = flatten_dict(params), {}
    for mapping in mappings:
        leaf = np.asarray(leaves[mapping.path])
        for layer, names in zip(leaf if mapping.is_stacked else [leaf], mapping.names, strict=True):
            if mapping.layout is Layout.LINEAR and mapping.path[-1] == "kernel":
                num_inputs = 1 if mapping.dims[0] in "DFE" else len(mapping.dims) - 1
                layer = layer.reshape(int(np.prod(layer.shape[:num_inputs])), -1).T
            elif mapping.layout is Layout.LINEAR:
                layer = layer.reshape(-1)
            elif mapping.layout is Layout.OFFSET:
                layer = np.concatenate([np.zeros((offset, layer.shape[1]), layer.dtype), layer])
            for name, tensor in zip(names, np.split(layer, len(names)), strict=True):
                tensors[name] = np.ascontiguousarray(tensor)
    return tensors


def tensors_to_params(mappings: Sequence[ParamMapping], tensors: Mapping[str, np.ndarray], offset: int) -> Params:
    """Converts weights to parameters, float32 by path. A parameter with a missing weight is left out.

    Raises:
      ValueError: a weight has another shape than the parameter needs; the message names it.
    """
    params = {}
    for mapping in mappings:
        if not all(name in tensors for names in mapping.names for name in names):
            continue
        shape = mapping.shape[1:] if mapping.is_stacked else mapping.shape
        layers = []
        for names in mapping.names:
            layer = np.concatenate([np.asarray(tensors[name], np.float32) for name in names])
            if mapping.layout is Layout.LINEAR and mapping.path[-1] == "kernel":
                layer = layer.T
            elif mapping.layout is Layout.OFFSET:
                layer = layer[offset:]
            if layer.size != np.prod(shape) or (mapping.layout is not Layout.LINEAR and layer.shape != tuple(shape)):
                shapes = ", ".join(str(tuple(tensors[name].shape)) for name in names)
                raise ValueError(f"{names[0]} has shape {shapes}; the config needs {tuple(shape)}")
            layers.append(layer.reshape(shape))
        params[mapping.path] = np.stack(layers) if mapping.is_stacked else layers[0]
    return params


def load_params(
    folder: Folder,
    mappings: Sequence[ParamMapping],
    new_tokens: Mapping[int, np.ndarray],
    reinit_head: bool,
    log: Log,
    read_apart: Collection[str] = (),
) -> Params:
    """Reads the parameters of a model from a folder.

    Args:
      mappings: from `param_mappings`.
      new_tokens: token id that the folder's vocabulary lacks -> ids of the tokens that spell it there (`subtokens`).
        Its embedding is the mean of theirs (arXiv:2112.14569 §3.1).
      reinit_head: leaves the head out.
      log: called with lines on what is used and what is left out.
      read_apart: names of weights that the caller reads itself.

    Returns:
      float32 arrays by path, without those of a head that is left out.

    Raises:
      UserError: weights are missing, are not used by our model, or have another shape. MissingHead: those of the head.
    """
    tensors = _select(folder, mappings, reinit_head, log, read_apart)
    for mapping in mappings:
        if mapping.dims[0] == "V" and (name := mapping.names[0][0]) in tensors:
            if (found := len(tensors[name])) != (rows := folder.config["vocab_size"]):
                raise UserError(f"init_from: '{folder.path}' has {found} rows in {name}, but vocab_size = {rows}")
            tensors[name] = _extend_vocab(tensors[name], mapping.shape[0], new_tokens)
    with as_user_error(f"init_from: '{folder.path}': ", ValueError):
        return tensors_to_params(mappings, tensors, position_offset(folder.config))


def subtokens(before: Tokenizer, after: Tokenizer) -> dict[int, np.ndarray]:
    """Returns, for every token that `after` has in addition to `before`, the ids that spell it in `before`.

    Raises:
      UserError: `after` is no extension of `before`.
    """
    if after.tokens[: before.vocab_size] != before.tokens:
        raise UserError("the corpus was made with another tokenizer than tokenizer.path; prepare it again")
    return {i: before.encode([after.decode([i])])[0] for i in range(before.vocab_size, after.vocab_size)}


def _select(
    folder: Folder, mappings: Sequence[ParamMapping], reinit_head: bool, log: Log, read_apart: Collection[str]
) -> dict[str, np.ndarray]:
    """Returns the weights that the parameters are made of, and checks that they are complete and nothing is lost."""
    architecture, tensors = folder.architecture, folder.tensors()
    for name, twin in architecture.tied.items():
        if name in tensors and not np.array_equal(tensors[name], tensors.setdefault(twin, tensors[name])):
            raise UserError(f"init_from: '{folder.path}' has {name} unlike {twin}; our model ties the two")
        tensors.pop(name, None)
    kept = [mapping for mapping in mappings if not (reinit_head and mapping.path[0] == "head")]
    used = {name: mapping.path for mapping in kept for names in mapping.names for name in names}
    missing = [name for name in used if name not in tensors]
    extra = [name for name in tensors if name not in used and name not in read_apart]
    # With `reinit_head`, other heads are left out, too.
    others = [name for name in extra if reinit_head and not name.startswith(architecture.prefix)]
    left_out = [name for name in extra if name.startswith(architecture.unused) or name in others]
    extra = [name for name in extra if name not in left_out]
    if missing and all(used[name][0] == "head" for name in missing):
        problem = f"has no vocabulary head (it lacks {_abridge(missing)})"
        raise MissingHead(f"init_from: '{folder.path}' {problem}; set reinit_head=True to train a new one")
    quantized = [
        f"{name} of {x.dtype}" for name in used if (x := tensors.get(name)) is not None and x.dtype.name not in _DTYPES
    ]
    problems = [f"lacks {_abridge(missing)}"] if missing else []
    problems += [f"has {_abridge(quantized)}, where {', '.join(_DTYPES)} is expected"] if quantized else []
    problems += [f"has {_abridge(extra)}, which our model does not use"] if extra else []
    if problems:
        raise UserError(f"init_from: '{folder.path}' {' and '.join(problems)}")
    log(f"started from '{folder.path}', {len(used):,} weights of {architecture.class_name}")
    if left_out:
        log(f"    left out: {_abridge(left_out)}")
    if reinit_head:
        log("    the vocabulary head is new")
    return {name: tensors[name] for name in used}


def _abridge(names: list[str]) -> str:
    return ", ".join(names[:4]) + (f" and {len(names) - 4} more" if len(names) > 4 else "")


def _extend_vocab(tensor: np.ndarray, rows: int, new_tokens: Mapping[int, np.ndarray]) -> np.ndarray:
    """Returns an embedding or bias with `rows` rows; those that stand for no token are the mean of all."""
    tensor = np.asarray(tensor, np.float32)
    padding = np.repeat(tensor.mean(0, keepdims=True), max(0, rows - len(tensor)), axis=0)
    result = np.concatenate([tensor, padding])
    for i, ids in new_tokens.items():
        result[i] = tensor[ids].mean(0)
    return result
