"""Held-out loss and accuracy of an encoder that was trained to detect replaced tokens, beside two baselines that look
at nothing, and the loss of its generator.

The masks, and the noise by which the generator fills them, follow from the seed and the row's number. What is filled in
also depends on the generator, so that the losses of two runs are of different questions.
"""

import math
from collections.abc import Callable
from typing import Any, NamedTuple

import numpy as np

from flax_mlm.data.mixture import Mixture
from flax_mlm.evaluation import mlm
from flax_mlm.inference.load import LoadedModel


class Measured(NamedTuple):
    """Sums of each row, float64 (R,): one corpus after another, and of the rows that fill the last batch."""

    rows_C: list[int]  # how many rows of each corpus
    tokens: np.ndarray  # judged: all but special ones
    loss: np.ndarray
    correct: np.ndarray
    replaced: np.ndarray  # tokens that are not the original
    found: np.ndarray  # of those, the ones that were called so
    masked: np.ndarray  # slots that the generator filled
    generator_loss: np.ndarray
    generator_correct: np.ndarray


def run(trained: LoadedModel, corpus: Mixture, poll: Callable[[], bool] = lambda: False) -> dict[str, float]:
    """Evaluates on the held-out rows, each once. Arguments and errors are those of `mlm.run`.

    Returns:
      loss (nats per token that is not special) and accuracy of the discriminator with their standard errors over rows;
      recall_replaced and recall_original (shares of either kind that were called so); replaced (the share of the tokens
      that are), and of that the baselines replaced_entropy (nats) and majority_accuracy; generator_loss (nats per
      masked token, with its standard error), generator_accuracy; rows, tokens, predicted_tokens. Of several corpora
      also loss, loss_stderr, accuracy and tokens of each, as `loss/NAME`.
    """
    return summary(measure(trained, corpus, poll), corpus)


def measure(trained: LoadedModel, corpus: Mixture, poll: Callable[[], bool]) -> Measured:
    """As `run`, with the sums that its numbers follow from."""
    rows: list[np.ndarray] = []
    for _, answers in mlm.answers(trained, corpus, poll):
        found = answers.scored
        sums = (
            *(found.ordinary_BL, found.loss_BL, found.correct_BL),
            *(found.replaced_BL, found.replaced_BL * found.correct_BL),
            *(answers.weights_BK, found.generator.loss_BK, found.generator.correct_BK),
        )
        rows.append(np.stack([np.asarray(x, np.float64).sum(1) for x in sums]))
    rows_C = [len(numbers) for numbers in corpus.held_out(trained.config.eval.max_rows)]
    return Measured(rows_C, *np.concatenate(rows, axis=1))


def summary(m: Measured, corpus: Mixture) -> dict[str, float]:
    """What `run` returns."""
    total, replaced, masked = m.tokens.sum(), m.replaced.sum(), m.masked.sum()
    share = replaced / total
    result = {
        "loss": m.loss.sum() / total,
        "loss_stderr": mlm.ratio_stderr(m.loss, m.tokens),
        "accuracy": m.correct.sum() / total,
        "accuracy_stderr": mlm.ratio_stderr(m.correct, m.tokens),
        "recall_replaced": m.found.sum() / max(replaced, 1.0),
        "recall_original": (m.correct - m.found).sum() / max(total - replaced, 1.0),
        "replaced": share,
        "replaced_entropy": -sum(p * math.log(p) for p in (share, 1 - share) if p > 0),
        "majority_accuracy": max(share, 1 - share),
        "generator_loss": m.generator_loss.sum() / masked,
        "generator_loss_stderr": mlm.ratio_stderr(m.generator_loss, m.masked),
        "generator_accuracy": m.generator_correct.sum() / masked,
        "rows": int((m.tokens > 0).sum()),
        "tokens": int(total),
        "predicted_tokens": int(masked),
    }
    for name, rows_R3 in mlm.rows_of_each(np.stack([m.tokens, m.loss, m.correct], axis=1), m.rows_C, corpus).items():
        tokens, loss, correct = rows_R3.T
        result |= {
            f"loss/{name}": loss.sum() / tokens.sum(),
            f"loss_stderr/{name}": mlm.ratio_stderr(loss, tokens),
            f"accuracy/{name}": correct.sum() / tokens.sum(),
            f"tokens/{name}": int(tokens.sum()),
        }
    return result


def table(result: dict[str, Any]) -> list[str]:
    """The result as lines for a person."""
    return [
        f"held-out replaced-token loss  {result['loss']:.4f} ± {result['loss_stderr']:.4f} nats"
        f"    entropy of replaced   {result['replaced_entropy']:.4f}",
        f"replaced-token accuracy       {result['accuracy']:.4f} ± {result['accuracy_stderr']:.4f}"
        f"         majority baseline     {result['majority_accuracy']:.4f}",
        f"replaced tokens found         {result['recall_replaced']:.4f}"
        f"                  originals left alone  {result['recall_original']:.4f}",
        f"generator's masked-token loss {result['generator_loss']:.4f} ± {result['generator_loss_stderr']:.4f} nats"
        f"    accuracy              {result['generator_accuracy']:.4f}",
        f"over {result['tokens']:,} tokens in {result['rows']:,} rows, {result['predicted_tokens']:,} of them masked, "
        f"{result['replaced']:.1%} replaced; each row once, fixed masks and noise",
        *mlm.by_corpus(result, "tokens"),
    ]
