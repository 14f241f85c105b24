"""Held-out loss and accuracy, with fixed masks and standard errors, beside two context-free baselines."""

import math
from collections.abc import Callable

import jax
import numpy as np
from jax.experimental import multihost_utils

from flax_mlm import sharding
from flax_mlm.data.corpus import Corpus
from flax_mlm.data.pipeline import eval_batches
from flax_mlm.preemption import Stopped
from flax_mlm.trained import Trained


def run(trained: Trained, corpus: Corpus, poll: Callable[[], bool] = lambda: False) -> dict[str, float]:
    """Evaluates on the held-out rows, each once. Masks follow from the seed and the row's number, so that every
    call, on any number of devices, predicts the same tokens.

    Args:
      trained: The model.
      corpus: Its validation split is used.
      poll: Called before every batch; says whether this process wants to stop.

    Raises:
      Stopped: one of the processes wants to.

    Returns:
      loss (nats per predicted token) and accuracy with their standard errors over rows, perplexity,
      bits_per_byte (tokens of the held-out text × loss / its bytes), rows, predicted_tokens; and of the same
      rows' tokens unigram_entropy (nats) and majority_accuracy (always saying the most frequent token).
    """
    config, mesh, vocab = trained.config, trained.mesh, trained.vocab
    rows = corpus.split("validation")
    sums, counts_V = [], np.zeros(corpus.vocab_size, np.int64)
    for batch in eval_batches(
        rows,
        batch_size=config.eval.batch_size,
        max_rows=config.eval.max_rows,
        process_index=jax.process_index(),
        process_count=jax.process_count(),
    ):
        counts_V += np.bincount(batch["tokens"].ravel(), minlength=corpus.vocab_size)
        del batch["valid"]  # rows that fill up the last batch are all padding and have nothing to predict
        global_batch = sharding.global_batch(batch, mesh, stop=poll())
        batch_sums, stop = jax.device_get(trained.steps.evaluate(trained.params, global_batch, vocab))
        if stop:
            raise Stopped
        sums.append([np.asarray(x, np.float64) for x in batch_sums])
    loss_R, correct_R, count_R = (np.concatenate(x) for x in zip(*sums, strict=True))
    if jax.process_count() > 1:  # each has seen its own rows
        counts_V = np.asarray(multihost_utils.process_allgather(counts_V)).sum(0)
    counts_V = counts_V[~np.asarray(vocab.is_special)]
    total, tokens = count_R.sum(), counts_V.sum()
    loss, accuracy = loss_R.sum() / total, correct_R.sum() / total
    frequency_V = counts_V[counts_V > 0] / tokens
    held_out = corpus.counts["validation"]
    return {
        "loss": loss,
        "loss_stderr": math.sqrt(np.square(loss_R - loss * count_R).sum()) / total,
        "accuracy": accuracy,
        "accuracy_stderr": math.sqrt(np.square(correct_R - accuracy * count_R).sum()) / total,
        "perplexity": math.exp(min(loss, 700.0)),
        "bits_per_byte": loss / math.log(2) * held_out["tokens"] / held_out["bytes"],
        "unigram_entropy": float(-(frequency_V * np.log(frequency_V)).sum()),
        "majority_accuracy": float(frequency_V.max()),
        "rows": int((count_R > 0).sum()),
        "predicted_tokens": int(total),
    }


def table(result: dict[str, float], objective: str = "mlm") -> list[str]:
    """The result as lines for a person."""
    what = "masked" if objective == "mlm" else "next"
    return [
        f"held-out {what}-token loss  {result['loss']:.4f} ± {result['loss_stderr']:.4f} nats"
        f"    unigram entropy    {result['unigram_entropy']:.4f}"
        f"    ({result['unigram_entropy'] - result['loss']:+.2f} nats better)",
        f"{what}-token accuracy       {result['accuracy']:.4f} ± {result['accuracy_stderr']:.4f}"
        f"         majority baseline  {result['majority_accuracy']:.4f}"
        f"    ({result['accuracy'] / result['majority_accuracy']:.1f} times)",
        f"perplexity                 {result['perplexity']:.2f}",
        f"bits per byte              {result['bits_per_byte']:.3f}",
        f"over {result['predicted_tokens']:,} predicted tokens in {result['rows']:,} rows, each row once, fixed masks",
    ]
