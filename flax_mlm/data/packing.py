"""Packing documents into rows of L tokens: `[CLS] chunk [SEP]` segments one after another, then `[PAD]`.

Pure functions of their arguments. Every token is written once, and the tokens of a chunk stay together.
"""

import numpy as np

from flax_mlm.data.tokenizer import Tokenizer

_BLOCK_TOKENS = 1 << 20  # that are copied at a time: their indices need 24 bytes each


def pack(tokens: np.ndarray, lengths: np.ndarray, seq_len: int, tokenizer: Tokenizer, packing: str) -> np.ndarray:
    """Packs documents into rows.

    Args:
      tokens: (T,) ids of all documents, one after another.
      lengths: (D,) tokens of each document, in total T.
      seq_len: L.
      tokenizer: has the ids of special tokens.
      packing: "best_fit" puts each chunk where it leaves least room; "sequential" keeps the order.

    Returns:
      (R, L), with the dtype of `tokens`.
    """
    chunks, row = {"best_fit": best_fit, "sequential": sequential}[packing](lengths, seq_len)
    order = np.argsort(row, kind="stable")  # chunks of a row stay in the order of the text
    start = np.concatenate([[0], np.cumsum(chunks)[:-1]])[order]  # of each chunk in tokens
    size, row = chunks[order], row[order]
    # Column of each segment: the length of all segments before it, less those of earlier rows.
    end = np.cumsum(size + 2)
    begin = end - (size + 2)
    column = begin - begin[np.searchsorted(row, row)]

    rows = np.full((row[-1] + 1 if row.size else 0, seq_len), tokenizer.pad_id, tokens.dtype)
    flat = rows.reshape(-1)
    at = row * seq_len + column
    flat[at] = tokenizer.cls_id
    flat[at + size + 1] = tokenizer.sep_id
    step = max(1, _BLOCK_TOKENS // seq_len)
    for block in (slice(first, first + step) for first in range(0, len(size), step)):
        n = size[block]
        within = np.arange(n.sum()) - np.repeat(np.cumsum(n) - n, n)
        flat[np.repeat(at[block] + 1, n) + within] = tokens[np.repeat(start[block], n) + within]
    return rows


def best_fit(lengths: np.ndarray, seq_len: int) -> tuple[np.ndarray, np.ndarray]:
    """Packs by best-fit-decreasing.

    Documents are cut every L-2 tokens; the rest of each goes where it leaves least room.

    Returns:
      int64 (C,) lengths of the chunks, in the order of the text; int64 (C,) row of each chunk.
    """
    limit = seq_len - 2
    lengths = np.asarray(lengths, np.int64)
    lengths = lengths[lengths > 0]
    counts = -(-lengths // limit)
    chunks = np.full(counts.sum(), limit, np.int64)
    chunks[np.cumsum(counts) - 1] = lengths - (counts - 1) * limit

    row = np.arange(len(chunks))  # a row of its own, unless it fits elsewhere
    rows_by_room: list[list[int]] = [[] for _ in range(seq_len + 1)]  # rows by the number of free columns
    nonempty = 0  # bit r is set where rows_by_room[r] has a row
    short = np.flatnonzero(chunks < limit)
    short = short[np.argsort(-chunks[short], kind="stable")]
    for chunk, need in zip(short.tolist(), (chunks[short] + 2).tolist(), strict=True):
        fits = nonempty >> need
        if fits:
            free = need + (fits & -fits).bit_length() - 1
            target = rows_by_room[free].pop()
            nonempty ^= (not rows_by_room[free]) << free
        else:
            free = seq_len
            target = chunk
        row[chunk] = target
        rows_by_room[free - need].append(target)
        nonempty |= 1 << (free - need)
    return chunks, np.unique(row, return_inverse=True)[1].reshape(-1)


def sequential(lengths: np.ndarray, seq_len: int) -> tuple[np.ndarray, np.ndarray]:
    """Packs row after row in the order of the text; returns what `best_fit` does."""
    chunks, rows = [], []
    row, free = 0, seq_len
    for length in np.asarray(lengths).tolist():
        while length:
            if free < 3:  # [CLS], one token, [SEP]
                row, free = row + 1, seq_len
            chunk = min(length, free - 2)
            chunks.append(chunk)
            rows.append(row)
            length -= chunk
            free -= chunk + 2
    return np.array(chunks, np.int64), np.array(rows, np.int64)
