"""Starting a run with the weights of a Hugging Face folder."""

from collections.abc import Callable
from typing import Any

import jax
import numpy as np

from flax_mlm.config.schema import Config
from flax_mlm.data.tokenizer.base import Tokenizer
from flax_mlm.data.tokenizer.load import load_tokenizer
from flax_mlm.errors import UserError
from flax_mlm.hf import architecture as architecture_lib
from flax_mlm.hf import folder as folder_lib
from flax_mlm.training.step import Steps, TrainState


def state(config: Config, steps: Steps, tokenizer: Tokenizer, log: Callable[[str], None]) -> TrainState:
    """A new state with the weights of the folder `config.init_from`.

    Args:
      tokenizer: of the run. Tokens that `tokenizer.extra_tokens_file` has added begin as the mean of the tokens
        that spelled them before (arXiv:2112.14569 §3.1).
      log: is told what is taken, and what is left out.

    Raises:
      UserError: weights are missing, have no place here, or have another shape; or the tokenizer is another one.
    """
    folder = folder_lib.open_folder(config.init_from)
    where = list(architecture_lib.places(folder.architecture, steps.model, config.model.num_layers))
    tensors = _checked(folder, where, config.reinit_head, log)
    spelled = _spelled(config, tokenizer)
    for place in where:
        if place.dims[0] == "V" and (name := place.names[0][0]) in tensors:
            tensors[name] = _with_rows(tensors[name], place.shape[0], spelled)
    try:
        params = architecture_lib.to_ours(where, tensors, folder.offset)
    except ValueError as e:
        raise UserError(f"init_from: '{folder.path}': {e}") from e
    fresh = steps.init().params

    def put(path: Any, new: jax.Array) -> jax.Array:
        array = params.get(tuple(key.key for key in path))
        return new if array is None else jax.make_array_from_callback(new.shape, new.sharding, lambda i: array[i])

    return steps.init(jax.tree_util.tree_map_with_path(put, fresh))


def _checked(
    folder: folder_lib.Folder, where: list[architecture_lib.ParamMapping], new_head: bool, log: Callable[[str], None]
) -> dict[str, np.ndarray]:
    """The weights of the folder that are wanted, all of them."""
    architecture, tensors = folder.architecture, folder.tensors()
    wanted = {name: place for place in where for names in place.names for name in names}
    for name, twin in architecture.same.items():
        if name in tensors and not np.array_equal(tensors[name], tensors.setdefault(twin, tensors[name])):
            raise UserError(f"init_from: '{folder.path}' has {name} unlike {twin}; here the two are tied")
        tensors.pop(name, None)
    if new_head:
        wanted = {name: place for name, place in wanted.items() if place.path[0] != "head"}
    missing = [name for name in wanted if name not in tensors]
    extra = [name for name in tensors if name not in wanted]
    left_out = [name for name in extra if name.startswith(architecture.unused)]
    if new_head:  # nor is any other head wanted
        left_out += [name for name in extra if not name.startswith(architecture.base)]
    extra = [name for name in extra if name not in left_out]
    if missing and all(wanted[name].path[0] == "head" for name in missing):
        raise UserError(
            f"init_from: '{folder.path}' has no vocabulary head (it lacks {_some(missing)}); "
            "set reinit_head=True to train a new one"
        )
    if missing or extra:
        lacks = f" lacks {_some(missing)}" if missing else ""
        has = f" has {_some(extra)}, without a place here" if extra else ""
        raise UserError(f"init_from: '{folder.path}'{lacks}{' and' if lacks and has else ''}{has}")
    log(f"started from '{folder.path}', {len(wanted):,} weights of {architecture.class_name}")
    if left_out:
        log(f"    left out: {_some(left_out)}")
    if new_head:
        log("    the vocabulary head is new")
    return {name: tensors[name] for name in wanted}


def _some(names: list[str]) -> str:
    return ", ".join(names[:4]) + (f" and {len(names) - 4} more" if len(names) > 4 else "")


def _spelled(config: Config, tokenizer: Tokenizer) -> dict[int, np.ndarray]:
    """For every piece that the tokenizer to start from lacks, the pieces that it has instead."""
    before = load_tokenizer(config.tokenizer.path)
    if tokenizer.tokens[: before.vocab_size] != before.tokens:
        raise UserError(f"the corpus was made with another tokenizer than {config.tokenizer.path}, to start from")
    new = range(before.vocab_size, tokenizer.vocab_size)
    return {i: before.encode([tokenizer.decode([i])])[0] for i in new}


def _with_rows(tensor: np.ndarray, rows: int, spelled: dict[int, np.ndarray]) -> np.ndarray:
    """An embedding or bias with more rows, (rows, ...)."""
    tensor = np.asarray(tensor, np.float32)
    more = np.repeat(tensor.mean(0, keepdims=True), max(0, rows - len(tensor)), axis=0)
    result = np.concatenate([tensor, more])
    for i, pieces in spelled.items():
        result[i] = tensor[pieces].mean(0)
    return result
