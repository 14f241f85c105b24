"""Near-duplicates of known similarity, planted in real text, and the similarity of all pairs of documents.

Everything here is written a second time, without the library: words, n-grams and similarity by Python's own strings and
sets.
"""

import bisect
import collections
import itertools
import random
import unicodedata
from collections.abc import Mapping, Sequence, Set

from flax_mlm.data.words import stands_alone


def words(text: str) -> list[str]:
    """The words of a text: runs of letters, digits and combining marks, in lower case."""
    found, run = [], ""
    for char in unicodedata.normalize("NFC", text).lower() + " ":
        is_letter = (char.isascii() and char.isalnum()) or unicodedata.category(char)[0] in "LMN"
        if is_letter and (char.isascii() or stands_alone(char)):
            run += char
            continue
        found += [run] * bool(run) + [char] * is_letter
        run = ""
    return found


def ngrams(sequence: Sequence[str], n: int = 5) -> Set[tuple[str, ...]]:
    """All n-grams; of a shorter text the one of all words."""
    if not sequence:
        return frozenset()
    return frozenset(tuple(sequence[i : i + n]) for i in range(max(1, len(sequence) - n + 1)))


def jaccard(first: Set[tuple[str, ...]], second: Set[tuple[str, ...]]) -> float:
    both = len(first & second)
    return both / (len(first) + len(second) - both)


def variant(text: str, similarity: float, rng: random.Random) -> tuple[str, float]:
    """A copy with some words exchanged, as many as leave it at least so similar; and how similar it is."""
    original, parts = ngrams(words(text)), text.split(" ")
    exchanges = [(position, rng.choice(parts)) for position in rng.sample(range(len(parts)), len(parts))]

    def exchanged(count: int) -> str:
        return " ".join({**dict(enumerate(parts)), **dict(exchanges[:count])}.values())

    def distance(count: int) -> float:
        return 1 - jaccard(original, ngrams(words(exchanged(count))))

    count = bisect.bisect_right(range(len(parts)), 1 - similarity, key=distance) - 1
    return exchanged(count), 1 - distance(count)


def all_pairs(sets: Sequence[Set[tuple[str, ...]]], least: float) -> Mapping[tuple[int, int], float]:
    """The similarity of all pairs of sets of n-grams that are at least so similar, computed exactly."""
    owners: dict[tuple[str, ...], list[int]] = collections.defaultdict(list)
    for number, grams in enumerate(sets):
        for gram in grams:
            owners[gram].append(number)
    shared = (group for group in owners.values() if len(group) > 1)
    both = collections.Counter(pair for group in shared for pair in itertools.combinations(group, 2))
    found = {pair: n / (len(sets[pair[0]]) + len(sets[pair[1]]) - n) for pair, n in both.items()}
    return {pair: value for pair, value in found.items() if value >= least}
