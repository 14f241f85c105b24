"""Held-out loss and accuracy of replaced-token detection, beside two context-free baselines and the generator's loss.

Masks, and the noise by which the generator replaces tokens, follow from the seed and the row's number. The replacements
also depend on the generator, so that the losses of two runs are over different inputs.
"""

import math
from collections.abc import Iterable
from typing import Any

import numpy as np

from flax_mlm.evaluation import metrics, report
from flax_mlm.inference.forward import EvalOutput


def measure(outputs: Iterable[tuple[Any, EvalOutput]]) -> dict[str, np.ndarray]:
    """Sums what `summary` is computed from.

    Args:
      outputs: tokens and output of all batches of held-out rows.

    Returns:
      sums of each row, float64 (R,), corpus by corpus, then of the rows that fill up the last batch.
    """
    rows = []
    for _, output in outputs:
        d = output.scored
        sums = {
            "tokens": d.ordinary_BL,  # tokens that are not special: the discriminator predicts these
            "loss": d.loss_BL,
            "correct": d.correct_BL,
            "replaced": d.replaced_BL,  # tokens that differ from the original
            "detected": d.replaced_BL * d.correct_BL,  # replaced tokens that the discriminator calls replaced
            "masked": output.weights_BK,  # tokens that the generator predicts
            "generator_loss": d.generator.loss_BK,
            "generator_correct": d.generator.correct_BK,
        }
        rows.append({name: np.asarray(x, np.float64).sum(1) for name, x in sums.items()})
    return {name: np.concatenate([batch[name] for batch in rows]) for name in rows[0]}


def summary(sums: dict[str, np.ndarray], num_rows: dict[str, int]) -> dict[str, float]:
    """Computes metrics of the rows, each once.

    Args:
      sums: see `measure`.
      num_rows: of each corpus.

    Returns:
      loss (nats per token that is not special) and accuracy of the discriminator with their standard errors over rows;
      recall_replaced and recall_original (fractions of replaced and of original tokens that are classified correctly);
      replaced (fraction of tokens that are), and its baselines replaced_entropy (nats) and majority_accuracy;
      generator_loss (nats per masked token, with its standard error), generator_accuracy; rows, tokens,
      predicted_tokens. With several corpora also loss, loss_stderr, accuracy, tokens and rows of each, as `loss/NAME`.
    """
    tokens, loss, correct = (sums[name] for name in ("tokens", "loss", "correct"))
    total, num_replaced, masked = (sums[name].sum() for name in ("tokens", "replaced", "masked"))
    replaced, detected = num_replaced / total, sums["detected"]
    generator = metrics.loss_and_accuracy(*(sums[name] for name in ("masked", "generator_loss", "generator_correct")))
    return {
        **metrics.loss_and_accuracy(tokens, loss, correct),
        "recall_replaced": detected.sum() / max(num_replaced, 1.0),
        "recall_original": (correct - detected).sum() / max(total - num_replaced, 1.0),
        "replaced": replaced,
        "replaced_entropy": -sum(p * math.log(p) for p in (replaced, 1 - replaced) if p > 0),
        "majority_accuracy": max(replaced, 1 - replaced),
        **{f"generator_{name}": generator[name] for name in ("loss", "loss_stderr", "accuracy")},
        "rows": int((tokens > 0).sum()),
        "tokens": int(total),
        "predicted_tokens": int(masked),
        **metrics.by_corpus((tokens, loss, correct), num_rows, "tokens"),
    }


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
        *report.corpus_lines(result, "tokens"),
    ]
