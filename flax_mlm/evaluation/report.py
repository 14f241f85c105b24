"""How a task that fine-tunes reports itself: of several seeds the median run, and how sure its number is."""

import statistics
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import numpy as np

from flax_mlm.errors import UserError
from flax_mlm.finetuning.loop import Searched


def median_run(scores: Sequence[float]) -> int:
    """The number of the run in the middle, the lower one of two."""
    return list(scores).index(statistics.median_low(scores))


def summary(
    scores: list[float], found: Searched, examples: dict[str, int], chosen_on_test: bool = False
) -> dict[str, Any]:
    """What every such result has: median over the seeds, spread (smallest and largest), the scores of all seeds, best
    (what was chosen on the development set), dev_scores by choice, examples of each part, and whether what was chosen
    was so on the test examples."""
    return {
        "median": statistics.median(scores),
        "spread": [min(scores), max(scores)],
        "scores": scores,
        "best": found.best,
        "dev_scores": found.dev_scores,
        "examples": examples,
        "chosen_on_test": chosen_on_test,
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
    if result["chosen_on_test"]:
        lines.append("without --test these are the same examples, so that the first number is a little too good")
    return lines


def bootstrap_stderr(metric: Callable[[np.ndarray], float], size: int, draws: int = 200) -> float:
    """Standard deviation of a metric over test sets drawn from this one with replacement.

    Args:
      metric: numbers of examples, some repeated -> its value over them.
    """
    rng = np.random.default_rng(0)
    return float(np.std([metric(rng.integers(0, size, size)) for _ in range(draws)]))


def tenth(count: int, labels: Sequence[Iterable[str]] = ()) -> tuple[list[int], list[int]]:
    """Numbers of nine tenths of the examples to train on and of one tenth to develop with, the same ones every time.

    Args:
      labels: of each example; one with a label that would not be learned is trained on.

    Raises:
      UserError: there are not two examples, or two that share their labels.
    """
    order, cut = np.random.default_rng(0).permutation(count).tolist(), max(count // 10, 1)
    train, dev = order[cut:], order[:cut]
    learned = {label for i in train for label in labels[i]} if labels else set()
    rare = [i for i in dev if labels and not learned.issuperset(labels[i])]
    train, dev = train + rare, [i for i in dev if i not in rare]
    if not train or not dev:
        raise UserError(f"--train holds {count} examples, too few to leave some out; give --dev")
    return train, dev
