"""Held-out loss and accuracy of replaced-token detection, beside two context-free baselines and the generator's loss.

Masks, and the noise by which the generator replaces tokens, follow from the seed and the row's number. The replacements
also depend on the generator, so that the losses of two runs are over different inputs.
"""

import math
from typing import Any, NamedTuple

import numpy as np

from flax_mlm.data.mixture import Mixture
from flax_mlm.evaluation import mlm
from flax_mlm.inference.embeddings import OnBatch
from flax_mlm.inference.model import LoadedModel


class Measurement(NamedTuple):
    """Sums of each row, float64 (R,), corpus by corpus, then of the rows that fill up the last batch."""

    rows_C: list[int]  # number of rows of each corpus
    tokens: np.ndarray  # tokens that are not special: the discriminator predicts these
    loss: np.ndarray
    correct: np.ndarray
    replaced: np.ndarray  # tokens that differ from the original
    detected: np.ndarray  # replaced tokens that the discriminator calls replaced
    masked: np.ndarray  # tokens that the generator predicts
    generator_loss: np.ndarray
    generator_correct: np.ndarray


def run(model: LoadedModel, corpus: Mixture, on_batch: OnBatch = lambda: None) -> dict[str, float]:
    """Evaluates on the held-out rows, each row once. Arguments and errors are those of `mlm.run`.

    Returns:
      loss (nats per token that is not special) and accuracy of the discriminator with their standard errors over rows;
      recall_replaced and recall_original (fractions of replaced and of original tokens that are classified correctly);
      replaced (fraction of tokens that are), and its baselines replaced_entropy (nats) and majority_accuracy;
      generator_loss (nats per masked token, with its standard error), generator_accuracy; rows, tokens,
      predicted_tokens. With several corpora also loss, loss_stderr, accuracy and tokens of each, as `loss/NAME`.
    """
    return summary(measure(model, corpus, on_batch), corpus)


def measure(model: LoadedModel, corpus: Mixture, on_batch: OnBatch = lambda: None) -> Measurement:
    """Sums what `summary` is computed from."""
    rows: list[np.ndarray] = []
    for _, output in mlm.eval_outputs(model, corpus, on_batch):
        d = output.scored
        sums = (
            *(d.ordinary_BL, d.loss_BL, d.correct_BL, d.replaced_BL, d.replaced_BL * d.correct_BL),
            *(output.weights_BK, d.generator.loss_BK, d.generator.correct_BK),
        )
        rows.append(np.stack([np.asarray(x, np.float64).sum(1) for x in sums]))
    rows_C = [len(indices) for indices in corpus.held_out(model.config.eval.max_rows)]
    return Measurement(rows_C, *np.concatenate(rows, axis=1))


def summary(m: Measurement, corpus: Mixture) -> dict[str, float]:
    """Computes the result of `run`."""
    total, num_replaced, masked = m.tokens.sum(), m.replaced.sum(), m.masked.sum()
    replaced = num_replaced / total
    result = {
        "loss": m.loss.sum() / total,
        "loss_stderr": mlm.ratio_stderr(m.loss, m.tokens),
        "accuracy": m.correct.sum() / total,
        "accuracy_stderr": mlm.ratio_stderr(m.correct, m.tokens),
        "recall_replaced": m.detected.sum() / max(num_replaced, 1.0),
        "recall_original": (m.correct - m.detected).sum() / max(total - num_replaced, 1.0),
        "replaced": replaced,
        "replaced_entropy": -sum(p * math.log(p) for p in (replaced, 1 - replaced) if p > 0),
        "majority_accuracy": max(replaced, 1 - replaced),
        "generator_loss": m.generator_loss.sum() / masked,
        "generator_loss_stderr": mlm.ratio_stderr(m.generator_loss, m.masked),
        "generator_accuracy": m.generator_correct.sum() / masked,
        "rows": int((m.tokens > 0).sum()),
        "tokens": int(total),
        "predicted_tokens": int(masked),
    }
    sums_R3 = np.stack([m.tokens, m.loss, m.correct], axis=1)
    for name, rows_R3 in mlm.split_by_corpus(sums_R3, m.rows_C, corpus).items():
        tokens, loss, correct = rows_R3.T
        result |= {
            f"loss/{name}": loss.sum() / tokens.sum(),
            f"loss_stderr/{name}": mlm.ratio_stderr(loss, tokens),
            f"accuracy/{name}": correct.sum() / tokens.sum(),
            f"tokens/{name}": int(tokens.sum()),
        }
    return result


def table(result: dict[str, Any]) -> list[str]:
    """Formats a result as lines of text."""
    return [
        f"held-out replaced-token loss  {result['loss']:.4f} ± {result['loss_stderr']:.4f} nats"
        f"    entropy of replaced   {result['replaced_entropy']:.4f}",
        f"replaced-token accuracy       {result['accuracy']:.4f} ± {result['accuracy_stderr']:.4f}"
        f"         majority baseline     {result['majority_accuracy']:.4f}",
        f"recall of replaced tokens     {result['recall_replaced']:.4f}"
        f"                  of original tokens    {result['recall_original']:.4f}",
        f"generator's masked-token loss {result['generator_loss']:.4f} ± {result['generator_loss_stderr']:.4f} nats"
        f"    accuracy              {result['generator_accuracy']:.4f}",
        f"over {result['tokens']:,} tokens in {result['rows']:,} rows, {result['predicted_tokens']:,} of them masked, "
        f"{result['replaced']:.1%} replaced; each row once, fixed masks and noise",
        *mlm.corpus_lines(result, "tokens"),
    ]
