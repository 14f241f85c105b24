"""Development sets and results of fine-tuning over several seeds, and tables of results as lines of text."""

import statistics
from collections.abc import Iterable, Iterator, Sequence
from typing import Any

import numpy as np

from flax_mlm.errors import UserError
from flax_mlm.finetuning.loop import SearchResult


def require(flag: str, value: str, expected: str) -> None:
    """Raises UserError where a flag that the task needs is empty."""
    if not value:
        raise UserError(f"--{flag} is missing; expected {expected}")


def hold_out(count: int, labels: Sequence[Iterable[str]] = ()) -> tuple[list[int], list[int]]:
    """Splits the indices of examples into nine tenths for training and one tenth for development.

    Args:
      labels: labels of each example; an example with a label that the training part lacks is moved there.

    Raises:
      UserError: one of the two parts would be empty.
    """
    order, cut = np.random.default_rng(0).permutation(count).tolist(), max(count // 10, 1)
    train, dev = order[cut:], order[:cut]
    known = {label for i in train for label in labels[i]} if labels else set()
    rare = [i for i in dev if labels and not known.issuperset(labels[i])]
    train, dev = train + rare, [i for i in dev if i not in rare]
    if not train or not dev:
        raise UserError(f"--train has {count} examples, too few to split off a development set; set --dev")
    return train, dev


def hold_out_queries(queries: list[str]) -> tuple[list[int], list[int]]:
    """Splits the indices of pairs as `hold_out`, all pairs of one query into the same part."""
    unique = list(dict.fromkeys(queries))
    train, dev = (frozenset(unique[i] for i in part) for part in hold_out(len(unique)))
    return [i for i, q in enumerate(queries) if q in train], [i for i, q in enumerate(queries) if q in dev]


def median_run(scores: Sequence[float]) -> int:
    """Index of the run with the median score, the lower one of two."""
    return list(scores).index(statistics.median_low(scores))


def summary(scores: list[float], search: SearchResult, sizes: dict[str, int], chosen_on_test: bool) -> dict[str, Any]:
    """Builds the entries that every fine-tuning result has.

    Args:
      scores: of every seed, on the test set.
      sizes: number of examples of each part.
      chosen_on_test: the development set is the test set.
    """
    return {
        "median": statistics.median(scores),
        "spread": [min(scores), max(scores)],
        "scores": scores,
        "best": search.best,
        "dev_scores": search.dev_scores,
        "examples": sizes,
        "chosen_on_test": chosen_on_test,
    }


def saved(search: SearchResult, scores: Sequence[float]) -> dict[str, float]:
    """Describes the seed that is kept, the best one on the development set; its score is that on the test set."""
    seed = search.best_seed
    return {"seed": seed, "dev_score": search.seed_scores[seed], "score": scores[seed]}


def table(result: dict[str, Any]) -> list[str]:
    """Formats a result as lines of text."""
    examples, (low, high) = result["examples"], result["spread"]
    value = f"{result['metric']}  {result['median']:.4f}  ± {result['stderr']:.4f}"
    lines = [f"{value} over the {examples['test']:,} examples"]
    if result["dev_scores"]:
        lines[0] += f"; median of {len(result['scores'])} runs, {low:.4f} to {high:.4f}"
        choices = ", ".join(f"{choice}: {score:.4f}" for choice, score in result["dev_scores"].items())
        lines.append(f"best of {choices} on {examples['dev']:,} development examples; trained on {examples['train']:,}")
    if "baseline" in result:
        lines.append(f"baseline without a model  {result['baseline']:.4f}  ({result['baseline_label']})")
        if result["median"] - result["stderr"] <= result["baseline"]:
            what = "not better than the baseline by more than the standard error"
            advice = "with finetune.method=full try higher finetune.learning_rates, or more finetune.epochs"
            lines.append(f"WARNING: {what}; {advice}")
    if kept := result.get("saved"):
        lines.append(
            f"saved seed {kept['seed']}, the best on the development set ({kept['dev_score']:.4f}): "
            f"{result['metric']} {kept['score']:.4f} here"
        )
    if result["chosen_on_test"]:
        lines.append("note: without --test the metric is that of the development set, and slightly optimistic")
    return lines


def corpus_lines(result: dict[str, Any], count_key: str) -> list[str]:
    """Formats the metrics of each of several corpora; `count_key` names the number of predictions."""
    names = [key.partition("/")[2] for key in result if key.startswith(f"{count_key}/")]
    width = max(map(len, names), default=0)
    lines = [f"    {name:{width}}  {'  '.join(_columns(result, name, count_key))}" for name in names]
    return ["by corpus:", *lines] if lines else []


def _columns(result: dict[str, Any], name: str, count_key: str) -> Iterator[str]:
    """Formats what a result has of one corpus; those of older versions have no rows and no tokens per word."""
    count, rows = result[f"{count_key}/{name}"], result.get(f"rows/{name}")
    if not count:
        yield "has no held-out tokens to predict"
        return
    stderr = f" ± {result[f'loss_stderr/{name}']:.4f}" if rows != 1 else ""  # of one row it is unknown
    yield f"loss {result[f'loss/{name}']:.4f}{stderr}"
    yield f"accuracy {result[f'accuracy/{name}']:.4f}"
    for key, title in (("bits_per_byte", "bits"), ("tokens_per_word", "tokens"), ("tokens_per_byte", "tokens")):
        if f"{key}/{name}" in result:
            yield f"{title}/{key.rpartition('_')[2]} {result[f'{key}/{name}']:.3f}"
    yield f"{count:>9,} tokens" + (f" in {rows:,} row{'s' * (rows > 1)}" if rows else "")


def group_lines(groups: dict[str, dict[str, float]]) -> list[str]:
    """Formats name -> loss, loss_stderr, accuracy and predicted_tokens."""
    width = max(map(len, groups))
    return [
        f"    {name:{width}}  loss {r['loss']:.4f} ± {r['loss_stderr']:.4f}  accuracy {r['accuracy']:.4f}  "
        f"{r['predicted_tokens']:>9,} tokens"
        for name, r in groups.items()
    ]
