"""Losses of ONNX networks on the checkpoint's own task: held-out loss of a masked model, cosine of vectors."""

import dataclasses
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import jax
import numpy as np

from flax_mlm.data.mixture import Mixture, open_corpus
from flax_mlm.data.pipeline import eval_batches
from flax_mlm.distributed import batches, mesh
from flax_mlm.errors import UserError
from flax_mlm.evaluation import metrics, mlm
from flax_mlm.hf import sentence_transformers
from flax_mlm.inference import embeddings, onnx
from flax_mlm.inference.forward import check_finite
from flax_mlm.inference.load import LoadedModel
from flax_mlm.inference.onnx import Drop, Outputs, Task
from flax_mlm.objectives import masking, rows, targets

MAX_ROWS = 256  # held-out rows where `eval.max_rows` does not say fewer


class _Prediction(NamedTuple):
    """One segment of a held-out row with its masks, and what is predicted in it."""

    row: int  # number of the row, from 0
    tokens: list[int]
    positions: np.ndarray  # int64 (K,), in the segment
    labels: np.ndarray  # int64 (K,)


def write_onnx(folder: Path, model: LoadedModel, int8: bool, max_drop: float) -> dict[str, Any]:
    """Writes the ONNX files of an exported folder, checked on the checkpoint's own task; see `onnx.write`.

    Args:
      folder: as `export` hands it to `complete`; removed by it where this raises.
      model: what was exported.

    Raises:
      UserError: an optional package is missing, or see `make_task`; Failure: a network is refused.
    """
    onnx.require_packages()
    texts = onnx.sample_texts(model.config.data.source)
    is_for_vectors = sentence_transformers.is_sentence_encoder(folder)
    rows = (embeddings.tokenize_for_vectors if is_for_vectors else embeddings.tokenize)(model, texts)
    task = make_task(model, texts, is_for_vectors)
    return onnx.write(folder, rows, model.tokenizer.pad_id, task, int8, max_drop)


def make_task(model: LoadedModel, texts: Sequence[str], is_for_vectors: bool) -> Task:
    """Returns the function that measures what a network loses.

    Args:
      texts: of which vectors are compared.
      is_for_vectors: the network computes hidden states, to be pooled.

    Raises:
      UserError: the corpus of a masked model cannot be used, or the objective is not `mlm`.
    """
    if model.task_head:
        what = f"the checkpoint has a head for {model.task_head.task}"
        raise UserError(f"{what}; --onnx writes masked models and encoders for vectors; leave out --onnx")
    if is_for_vectors:
        vectors_ND = embeddings.embed(model, texts)
        return lambda outputs: vector_drop(model, texts, vectors_ND, outputs)
    if (objective := model.config.objective.name) != "mlm":
        what = f"objective.name is {objective}; --onnx writes masked models (mlm) and encoders fine-tuned for vectors"
        raise UserError(f"{what}; leave out --onnx")
    model.require_head()
    corpus = open_corpus(model.config)
    if corpus.tokenizer().fingerprint != model.tokenizer.fingerprint:
        raise UserError(f"data.corpus is {corpus}, which was made with another tokenizer than the checkpoint")
    model = mlm.with_eval(model, corpus.seq_len, model.config.eval.mask_rate)
    count_R, loss_R, predictions = _held_out(model, corpus)
    return lambda outputs: masked_drop(count_R, loss_R, predictions, outputs)


def vector_drop(model: LoadedModel, texts: Sequence[str], vectors_ND: np.ndarray, outputs: Outputs) -> Drop:
    """Measures 1 - cosine between the vectors of a network and those of the model, after the same pooling."""
    states = outputs(embeddings.tokenize_for_vectors(model, texts))
    pooling = {"cls": lambda x_LD: x_LD[0], "last": lambda x_LD: x_LD[-1], "mean": lambda x_LD: x_LD.mean(0)}
    pooled = {i: pooling[model.config.finetune.pooling](state_LD.astype(np.float64)) for i, state_LD in states}
    found_ND = embeddings.normalize(np.stack([pooled[i] for i in range(len(texts))]))
    check_finite(found_ND)
    loss_N = 1 - (found_ND * vectors_ND).sum(1)
    stderr = float(loss_N.std() / len(loss_N) ** 0.5)
    mean = float(loss_N.mean())
    return Drop("1 - cosine", 0.0, mean, mean, stderr, f"{len(texts):,} texts, at most {loss_N.max():.2g}")


def masked_drop(count_R: np.ndarray, loss_R: np.ndarray, predictions: list[_Prediction], outputs: Outputs) -> Drop:
    """Measures the held-out masked loss of a network against that of the model.

    Args:
      count_R, loss_R: predicted tokens of each held-out row, and the model's sum of losses.
      predictions: of the same rows.
    """
    found_R = np.zeros_like(loss_R)
    for i, logits_LV in outputs([one.tokens for one in predictions]):
        one = predictions[i]
        logits_KV = logits_LV[one.positions].astype(np.float64)
        check_finite(logits_KV)
        largest_K1 = logits_KV.max(1, keepdims=True)
        total_K = np.log(np.exp(logits_KV - largest_K1).sum(1)) + largest_K1[:, 0]
        found_R[one.row] += (total_K - np.take_along_axis(logits_KV, one.labels[:, None], axis=1)[:, 0]).sum()
    zeros_R = np.zeros_like(loss_R)
    ours, theirs, drop = (
        metrics.loss_and_accuracy(count_R, sum_R, zeros_R) for sum_R in (loss_R, found_R, found_R - loss_R)
    )
    examples = f"{int(count_R.sum()):,} predicted tokens in {len(count_R):,} held-out rows"
    metric = "masked-token loss (nats)"
    return Drop(metric, ours["loss"], theirs["loss"], drop["loss"], drop["loss_stderr"], examples)


def _held_out(model: LoadedModel, corpus: Mixture) -> tuple[np.ndarray, np.ndarray, list[_Prediction]]:
    """Masks held-out rows as `evaluate --task=mlm` does, and computes the model's losses of them."""
    count_R, loss_R, predictions = list[float](), list[float](), list[_Prediction]()
    c = model.config
    limit = min(c.eval.max_rows or MAX_ROWS, MAX_ROWS)
    evaluation = dataclasses.replace(c.eval, max_rows=limit)
    model = model._replace(config=dataclasses.replace(c, eval=evaluation))
    for made, counts_B, losses_B in _evaluated(model, corpus):
        for b in np.flatnonzero(counts_B):
            predictions += _segments(len(count_R), jax.tree.map(lambda x, b=b: x[b], made))
            count_R.append(float(counts_B[b]))
            loss_R.append(float(losses_B[b]))
    return np.array(count_R), np.array(loss_R), predictions


def _evaluated(model: LoadedModel, corpus: Mixture) -> Iterator[tuple[Any, np.ndarray, np.ndarray]]:
    """Yields for batches of held-out rows their targets, and of each row the predicted tokens and the loss."""
    o, c = model.config.objective, model.config
    K = targets.max_predictions_per_row(o, c.data.seq_len, c.eval.mask_rate)
    rates, key = masking.rates(o, c.eval.mask_rate), rows.run_key(c, "eval")
    make = jax.jit(lambda batch, vocab: targets.make_targets(o, batch, key, vocab, rates, K))
    numbers, size = np.concatenate(corpus.held_out(c.eval.max_rows)), c.eval.batch_size
    mesh.check_batch("eval.batch_size", size, model.mesh)
    for batch in eval_batches(corpus.split("validation"), numbers, batch_size=size, local_rows=np.arange(size)):
        with mesh.use_mesh(model.mesh):
            sharded = batches.shard_batch(batch, model.mesh)
            made = jax.device_get(make(sharded, model.vocab))
            output, _ = jax.device_get(model.forward.evaluate(model.params, sharded, model.vocab))
        check_finite(output.scored)
        loss_BK = np.asarray(output.scored.loss_BK, np.float64)
        yield made, np.asarray(output.weights_BK, np.float64).sum(1), loss_BK.sum(1)


def _segments(row: int, made: targets.Targets) -> Iterator[_Prediction]:
    """Yields the segments of a row in which something is predicted: a network sees each of them alone.

    Args:
      row: the row's number.
      made: its targets, arrays without the dimension of the batch.
    """
    inputs_L, segment_ids_L = np.asarray(made.inputs_BL), np.asarray(made.segment_ids_BL)
    is_used_K = np.asarray(made.weights_BK) > 0
    predict_K, labels_K = np.asarray(made.predict_BK)[is_used_K], np.asarray(made.labels_BK)[is_used_K]
    segment_K = segment_ids_L[predict_K]
    for segment in np.unique(segment_K):
        (index,) = np.nonzero(segment_ids_L == segment)
        is_own_K = segment_K == segment
        positions = (predict_K[is_own_K] - index[0]).astype(np.int64)
        yield _Prediction(row, inputs_L[index].tolist(), positions, labels_K[is_own_K].astype(np.int64))
