"""How a task that fine-tunes reports itself: of several seeds the median run, and how sure its number is."""

import statistics
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

from flax_mlm.errors import UserError
from flax_mlm.finetune import Searched


def median_run(scores: Sequence[float]) -> int:
    """The number of the run in the middle, the lower one of two."""
    return list(scores).index(statistics.median_low(scores))


def summary(scores: list[float], found: Searched, examples: dict[str, int]) -> dict[str, Any]:
    """What every such result has: median over the seeds, spread (smallest and largest), the scores of all seeds, best
    (what was chosen on the development set), dev_scores by choice, and examples of each part."""
    return {
        "median": statistics.median(scores),
        "spread": [min(scores), max(scores)],
        "scores": scores,
        "best": found.best,
        "dev_scores": found.dev_scores,
        "examples": examples,
    }


def table(result: dict[str, Any]) -> list[str]:
    """The result as lines for a person."""
    examples, (low, high) = result["examples"], result["spread"]
    stderr = f"± {result['stderr']:.4f} over the {examples['test']:,} examples"
    lines = [f"{result['metric']}  {result['median']:.4f}  {stderr}"]
    if result["dev_scores"]:
        lines[0] += f"; median of {len(result['scores'])} runs, {low:.4f} to {high:.4f}"
        tried = ", ".join(f"{choice}: {score:.4f}" for choice, score in result["dev_scores"].items())
        lines.append(f"best of {tried} on {examples['dev']:,} development examples; trained on {examples['train']:,}")
    return lines


def bootstrap_stderr(metric: Callable[[np.ndarray], float], size: int, draws: int = 200) -> float:
    """Standard deviation of a metric over test sets drawn from this one with replacement.

    Args:
      metric: numbers of examples, some repeated -> its value over them.
    """
    rng = np.random.default_rng(0)
    return float(np.std([metric(rng.integers(0, size, size)) for _ in range(draws)]))


def tenth(count: int) -> tuple[np.ndarray, np.ndarray]:
    """Numbers of nine tenths of the examples to train on and of one tenth to develop with, the same ones every time.

    Raises:
      UserError: there are not two.
    """
    if count < 2:
        raise UserError(f"--train holds {count} example; it takes two at least where there is no --dev")
    order = np.random.default_rng(0).permutation(count)
    cut = max(count // 10, 1)
    return order[cut:], order[:cut]
