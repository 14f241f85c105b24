"""Loads a model from a checkpoint or a Hugging Face folder, ready for inference."""

import dataclasses
import functools
import sys
from collections.abc import Callable, Collection, Mapping, Sequence
from typing import Any, NamedTuple

import jax
import numpy as np
from etils import epath
from jax.sharding import Mesh

from flax_mlm.checkpoint.fingerprint import fingerprints
from flax_mlm.checkpoint.format import Damaged, find_checkpoints, read_meta, restore, stored_tokenizer
from flax_mlm.config.schema import Config
from flax_mlm.data.tokenizer import Tokenizer, load_tokenizer
from flax_mlm.distributed.batches import shard_replicated_rows
from flax_mlm.distributed.mesh import make_mesh, num_batch_shards, use_mesh
from flax_mlm.errors import UserError
from flax_mlm.hf import task_heads
from flax_mlm.hf.folder import Folder, is_hf_folder, open_folder
from flax_mlm.hf.weights import MissingHead, load_params, param_mappings, subtokens
from flax_mlm.inference.forward import Forward, build_forward, check_finite
from flax_mlm.inference.task_head import TaskHead, from_about
from flax_mlm.model import electra
from flax_mlm.objectives.rows import Vocabulary

_LENGTH_MULTIPLE = 32

OnBatch = Callable[[], Any]  # called before every batch
Log = Callable[[str], None]
Params = Any  # of a model, or of a fine-tuned encoder: a dict with the encoder's under "encoder"


class LoadedModel(NamedTuple):
    """A model with its parameters on a mesh. Use it under `use_mesh(mesh)`."""

    config: Config
    mesh: Mesh
    forward: Forward
    params: Any
    tokenizer: Tokenizer
    vocab: Vocabulary
    meta: Mapping[str, Any] = {}  # of the checkpoint; empty for a Hugging Face folder
    missing_head: MissingHead | None = None  # raised where the vocabulary head is used
    task_head: TaskHead | None = None  # of a fine-tuned model
    pooler: Mapping[str, Any] = {}  # pretrained first layer of a task's head, where a Hugging Face folder has one

    def require_head(self) -> None:
        """Raises MissingHead where the model has no vocabulary head."""
        if self.missing_head:
            raise self.missing_head

    @property
    def row_length(self) -> int:
        """Tokens of the rows that it was trained on; of a Hugging Face folder, all positions count as trained."""
        return self.config.model.max_positions if self.config.init_from else self.config.data.seq_len

    @property
    def max_length(self) -> int:
        """Tokens that a text may have: learned positions beyond the rows of the training were never trained."""
        model = self.config.model
        return self.row_length if model.position_embedding == "learned" else model.max_positions

    def padded_length(self, length: int) -> int:
        """Rounds the length of a batch up to one of a few lengths, since each is compiled."""
        return min(-(-length // _LENGTH_MULTIPLE) * _LENGTH_MULTIPLE, self.config.model.max_positions)

    def log_probs(
        self, rows: list[list[int]], positions: list[Any], labels: list[list[int]] | None, shape: tuple[int, int, int]
    ) -> np.ndarray:
        """Computes log-probabilities at positions of rows of tokens.

        Args:
          positions: of the hidden states to predict from.
          labels: tokens whose log-probabilities are wanted; None: all tokens.
          shape: rows B, rounded up to fit the mesh, length L and predictions K to pad to, since each shape is compiled.

        Returns:
          float32 (B, K) or (B, K, V), for `len(rows)` rows.

        Raises:
          NotFinite: the model computes NaN or infinity.
        """
        self.require_head()
        size = -(-shape[0] // num_batch_shards(self.mesh)) * num_batch_shards(self.mesh)
        tokens_BL = pad_rows(rows, (size, shape[1]), self.tokenizer.pad_id)
        predict_BK = pad_rows(positions, (size, shape[2]))
        labels_BK = None if labels is None else pad_rows(labels, predict_BK.shape)
        with use_mesh(self.mesh):
            inputs = shard_replicated_rows([tokens_BL, predict_BK, labels_BK], self.mesh)
            log_probs = np.array(self.forward.log_probs(self.params, *inputs, self.vocab))[: len(rows)]
        check_finite(log_probs)
        return log_probs


def pad_rows(rows: Sequence[Any], shape: tuple[int, int], value: int = 0) -> np.ndarray:
    """Builds an int32 array of this shape from at most as many rows of at most this length; the rest is `value`."""
    padded = np.full(shape, value, np.int32)
    for b, row in enumerate(rows):
        padded[b, : len(row)] = row
    return padded


def load_model(path: str, config: Config) -> LoadedModel:
    """Loads the newest sound checkpoint that `path` may mean, or a Hugging Face folder. Nothing is written.

    Args:
      path: the workdir of a run, WORKDIR@STEP, the folder of one checkpoint, or a Hugging Face folder.
      config: that of `inference.config.read_config`, with overrides applied.

    Raises:
      UserError: there is no checkpoint, or none that is sound and fits the config.
    """
    mesh = make_mesh(config.mesh)
    if is_hf_folder(path):
        return _load_folder(config, mesh)
    checkpoints, phase = find_checkpoints(path), None
    for checkpoint in checkpoints:
        try:
            meta = read_meta(checkpoint)
            phase = meta.get("phase", 0) if phase is None else phase
            if meta.get("phase", 0) != phase:
                raise UserError(f"checkpoint '{checkpoint}' is of another phase of the run; name its step to use it")
            return _load_checkpoint(checkpoint, meta, config, mesh)
        except Damaged as e:
            if checkpoint == checkpoints[-1]:
                raise
            print(f"{e}; using the one before", file=sys.stderr)
    raise AssertionError


def _load_checkpoint(checkpoint: epath.Path, meta: dict[str, Any], config: Config, mesh: Mesh) -> LoadedModel:
    tokenizer = stored_tokenizer(meta)
    with use_mesh(mesh):
        forward = build_forward(config, tokenizer.vocab_size, mesh)
        # A fine-tuned encoder was initialised with the average, and has none.
        item = "average" if config.optimizer.averages != "none" and "fine_tuned" not in meta else "params"
        abstract, head = forward.abstract_params, from_about(fine_tuned := meta.get("fine_tuned", {}))
        if head:
            abstract = {**abstract, "task": head.abstract_params(config.model, mesh)}
        params = restore(checkpoint, meta, {item: abstract})[item]
        head = head and head._replace(params=params.pop("task"))
        missing = MissingHead(fine_tuned["missing_head"]) if "missing_head" in fine_tuned else None
        vocab = Vocabulary.from_tokenizer(tokenizer)
        model = LoadedModel(config, mesh, forward, params, tokenizer, vocab, meta, missing, head)
        return untied(model) if config.objective.name == "rtd" else model


def _load_folder(config: Config, mesh: Mesh) -> LoadedModel:
    tokenizer = load_tokenizer(config.tokenizer.path, config.tokenizer.extra_tokens_file)
    folder = open_folder(config.init_from)
    with use_mesh(mesh):
        forward = build_forward(config, tokenizer.vocab_size, mesh)
        log: Log = functools.partial(print, file=sys.stderr)
        head = _head_of_folder(folder, config, mesh)
        apart = task_heads.weight_names(folder, head.task, config.model.use_bias) if head else {}
        fresh, missing = forward.init(), None
        try:
            params = start_params(config, fresh, forward.model.dims, tokenizer, log)
        except MissingHead as e:  # as sentence encoders are saved
            missing, headless = e, dataclasses.replace(config, reinit_head=True)
            params = start_params(
                headless,
                fresh,
                forward.model.dims,
                tokenizer,
                lambda line: None if "head is new" in line else log(line),
                apart,
            )
            note = f"it has a head for {head.task}" if head else "vectors and fine-tuning need none"
            log(f"    it has no vocabulary head; {note}")
        vocab = Vocabulary.from_tokenizer(tokenizer)
        pooler = {} if head else task_heads.read_pooler(folder, config.model.hidden_size)
        return LoadedModel(config, mesh, forward, params, tokenizer, vocab, {}, missing, head, pooler)


def _head_of_folder(folder: Folder, config: Config, mesh: Mesh) -> TaskHead | None:
    """Reads the task's head of a folder. Raises UserError: it cannot be used, or pools otherwise."""
    about = task_heads.describe(folder)
    head = from_about(about) if about else None
    if not about or not head:
        return None
    if not head.per_token and (own := config.finetune.pooling) != about["pooling"]:
        what = f"finetune.pooling is {own}, but the head of '{folder.path}' was trained on {about['pooling']}"
        raise UserError(f"{what}; leave it out")
    abstract = head.abstract_params(config.model, mesh)
    params = task_heads.from_tensors(folder, about, abstract, config.model.use_bias)
    return head._replace(params=jax.tree.map(lambda x, like: jax.device_put(x, like.sharding), params, abstract))


def start_params(
    config: Config, fresh: Any, dims: Any, tokenizer: Tokenizer, log: Log, read_apart: Collection[str] = ()
) -> Any:
    """Returns parameters that start from the Hugging Face folder `config.init_from`.

    Args:
      fresh: newly initialised parameters; those that the folder lacks are kept, and all shardings.
      dims: letters of their dimensions (`Model.dims`).
      tokenizer: of the run. A token that the folder's tokenizer lacks (`tokenizer.extra_tokens_file`) starts as the
        mean of the tokens that spell it there.
      log: called with lines on what is used and what is left out.
      read_apart: names of weights that the caller reads itself.

    Raises:
      UserError: weights are missing, are not used by our model, have another shape, or are NaN or infinite; or the
        tokenizer is another one.
    """
    folder = open_folder(config.init_from)
    mappings = list(param_mappings(folder.architecture, fresh, dims, config.model.num_layers))
    new_tokens = subtokens(load_tokenizer(config.tokenizer.path), tokenizer)
    params = load_params(folder, mappings, new_tokens, config.reinit_head, log, read_apart)
    if not tokenizer.puts_ends:
        ends = " and ".join(tokenizer.tokens[i] for i in (tokenizer.cls_id, tokenizer.sep_id))
        what = f"the tokenizer.json has no template with {ends} around a text"
        log(f"note: {what}; here they are put, so that results differ from those of a library that puts none")

    def start(path: Any, leaf: jax.Array) -> jax.Array:
        array = params.get(tuple(key.key for key in path))
        return leaf if array is None else jax.make_array_from_callback(leaf.shape, leaf.sharding, lambda i: array[i])

    started = jax.tree_util.tree_map_with_path(start, fresh)
    for name, (_, _, not_finite) in jax.device_get(fingerprints(started)).items():
        if not_finite:  # it need not show in what the model computes
            what = f"{config.init_from}: {not_finite} values of {name} are NaN or infinite; expected finite weights"
            raise UserError(f"{what}; use another folder")
    return started


def untied(model: LoadedModel) -> LoadedModel:
    """Returns an rtd model whose generator and discriminator have embeddings of their own: each is complete."""
    config, sharing = model.config, model.config.objective.embedding_sharing
    config = dataclasses.replace(config, objective=dataclasses.replace(config.objective, embedding_sharing="none"))
    forward = build_forward(config, model.tokenizer.vocab_size, model.mesh)
    return model._replace(config=config, forward=forward, params=electra.untied(model.params, sharing))
