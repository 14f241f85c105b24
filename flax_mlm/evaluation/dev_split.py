"""Development sets split off training sets: one tenth, the same examples every time."""

from collections.abc import Iterable, Sequence

import numpy as np

from flax_mlm.errors import UserError


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
