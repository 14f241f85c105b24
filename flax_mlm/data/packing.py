"""Documents into rows of L tokens: `[CLS] piece [SEP]` segments one after another, then `[PAD]`.

Pure functions of their arguments. Every token is written once, and the tokens of a piece stay together.
"""

import dataclasses

import numpy as np


@dataclasses.dataclass(frozen=True)
class Marks:
    """Ids of the tokens around pieces."""

    cls: int
    sep: int
    pad: int


def pack(tokens: np.ndarray, lengths: np.ndarray, seq_len: int, marks: Marks, packing: str) -> np.ndarray:
    """Packs documents into rows.

    Args:
      tokens: (T,) ids of all documents, one after another.
      lengths: (D,) tokens of each document, in total T.
      seq_len: L.
      marks: The special ids.
      packing: "best_fit" puts each piece where it leaves least room; "sequential" keeps the order.

    Returns:
      (R, L), of the dtype of `tokens`.
    """
    pieces, row = {"best_fit": best_fit, "sequential": sequential}[packing](lengths, seq_len)
    order = np.argsort(row, kind="stable")  # pieces of a row stay in the order of the text
    start = np.concatenate([[0], np.cumsum(pieces)[:-1]])[order]  # of each piece in tokens
    size, row = pieces[order], row[order]
    # Where each segment begins in its row: what the segments before it take, less those of earlier rows.
    end = np.cumsum(size + 2)
    begin = end - (size + 2)
    column = begin - begin[np.searchsorted(row, row)]

    rows = np.full((row[-1] + 1 if row.size else 0, seq_len), marks.pad, tokens.dtype)
    flat, at = rows.reshape(-1), row * seq_len + column
    flat[at] = marks.cls
    flat[at + size + 1] = marks.sep
    within = np.arange(size.sum()) - np.repeat(np.cumsum(size) - size, size)
    flat[np.repeat(at + 1, size) + within] = tokens[np.repeat(start, size) + within]
    return rows


def best_fit(lengths: np.ndarray, seq_len: int) -> tuple[np.ndarray, np.ndarray]:
    """Best-fit-decreasing: (P,) lengths of the pieces, in the order of the text, and (P,) the row of each.

    Documents are cut every L-2 tokens; what remains of each goes where it leaves least room.
    """
    limit = seq_len - 2
    lengths = np.asarray(lengths, np.int64)
    lengths = lengths[lengths > 0]
    counts = -(-lengths // limit)
    pieces = np.full(counts.sum(), limit, np.int64)
    pieces[np.cumsum(counts) - 1] = lengths - (counts - 1) * limit

    row = np.arange(len(pieces))  # a row of its own, unless it fits elsewhere
    room: list[list[int]] = [[] for _ in range(seq_len + 1)]  # rows by the places they have left
    some = 0  # bit r is set where room[r] is not empty
    short = np.flatnonzero(pieces < limit)
    short = short[np.argsort(-pieces[short], kind="stable")]
    for piece, need in zip(short.tolist(), (pieces[short] + 2).tolist(), strict=True):
        fits = some >> need
        if fits:
            free = need + (fits & -fits).bit_length() - 1
            target = room[free].pop()
            some ^= (not room[free]) << free
        else:
            free, target = seq_len, piece
        row[piece] = target
        room[free - need].append(target)
        some |= 1 << (free - need)
    return pieces, np.unique(row, return_inverse=True)[1].reshape(-1)


def sequential(lengths: np.ndarray, seq_len: int) -> tuple[np.ndarray, np.ndarray]:
    """Fills row after row in the order of the text: the same two arrays as `best_fit`."""
    pieces, rows = [], []
    row, free = 0, seq_len
    for length in np.asarray(lengths).tolist():
        while length:
            if free < 3:  # [CLS], one token, [SEP]
                row, free = row + 1, seq_len
            piece = min(length, free - 2)
            pieces.append(piece)
            rows.append(row)
            length, free = length - piece, free - piece - 2
    return np.array(pieces, np.int64), np.array(rows, np.int64)
