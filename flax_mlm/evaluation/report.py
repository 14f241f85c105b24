"""Results of fine-tuning over several seeds: median, spread, and the table of a task."""

import statistics
from collections.abc import Sequence
from typing import Any

from flax_mlm.finetuning.loop import SearchResult


def median_run(scores: Sequence[float]) -> int:
    """Index of the run with the median score, the lower one of two."""
    return list(scores).index(statistics.median_low(scores))


def summary(
    scores: list[float], search: SearchResult, examples: dict[str, int], chosen_on_test: bool = False
) -> dict[str, Any]:
    """Builds the entries that every fine-tuning result has.

    Args:
      scores: of every seed, on the test set.
      examples: number of examples of each part.
      chosen_on_test: the development set is the test set.
    """
    return {
        "median": statistics.median(scores),
        "spread": [min(scores), max(scores)],
        "scores": scores,
        "best": search.best,
        "dev_scores": search.dev_scores,
        "examples": examples,
        "chosen_on_test": chosen_on_test,
    }


def table(result: dict[str, Any]) -> list[str]:
    """Formats a result as lines of text."""
    examples, (low, high) = result["examples"], result["spread"]
    stderr = f"± {result['stderr']:.4f} over the {examples['test']:,} examples"
    lines = [f"{result['metric']}  {result['median']:.4f}  {stderr}"]
    if result["dev_scores"]:
        lines[0] += f"; median of {len(result['scores'])} runs, {low:.4f} to {high:.4f}"
        choices = ", ".join(f"{choice}: {score:.4f}" for choice, score in result["dev_scores"].items())
        lines.append(f"best of {choices} on {examples['dev']:,} development examples; trained on {examples['train']:,}")
    if result["chosen_on_test"]:
        lines.append("note: without --test the metric is that of the development set, and slightly optimistic")
    return lines
