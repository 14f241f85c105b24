"""An independent check of masking, in plain NumPy and without code of masking.py."""

import numpy as np

from flax_mlm.data.tokenizer import Tokenizer
from flax_mlm.objectives.masking import Masked

BROKEN = "broken: "  # prefix of the counts of violations


def measure(tokens_BL: np.ndarray, masked: Masked, tokenizer: Tokenizer, unit: str, mask_rate: float) -> dict[str, int]:
    """Counts of one masked batch; those whose names begin with `BROKEN` are 0 unless a law is broken.

    Args:
      tokens_BL: int32, before masking.
      unit: `objective.masking`.
      mask_rate: fraction of the maskable tokens to predict.
    """
    inputs_BL, positions_BK, labels_BK, weights_BK = map(np.asarray, masked)
    used_BK = weights_BK > 0
    used_B = used_BK.sum(1)
    row_B1 = np.arange(len(tokens_BL))[:, None]
    maskable_BL = ~tokenizer.is_special[tokens_BL] & (tokens_BL != tokenizer.pad_id)
    times_BL = np.zeros(tokens_BL.shape, np.int32)
    np.add.at(times_BL, (row_B1, positions_BK), used_BK)
    selected_BL = times_BL > 0
    shown = inputs_BL[row_B1, positions_BK][used_BK]
    label = labels_BK[used_BK]
    is_mask = shown == tokenizer.mask_id
    is_kept = shown == label
    random = shown[~is_mask & ~is_kept]

    # Integer arithmetic: halves round up, rates count in hundred-thousandths, at least one where a token is maskable.
    rate_units = int(np.round(np.float32(mask_rate) * np.float32(100_000)))  # in float32, as on the device
    maskable_B = maskable_BL.sum(1)
    expected_B = np.maximum((rate_units * maskable_B + 50_000) // 100_000, np.minimum(maskable_B, 1))
    short_B = used_B < expected_B
    size_BW, chosen_BW = _words(tokens_BL, maskable_BL, selected_BL, tokenizer)
    fits_B = ((size_BW > 0) & (size_BW <= expected_B[:, None])).any(1)
    cut_BW = (chosen_BW > 0) & (chosen_BW < size_BW) & fits_B[:, None]
    whole = unit == "whole_word"  # may fall short, but neither cuts a word nor predicts nothing
    wrong_B = (used_B > expected_B) | (short_B & ((used_B == 0) | (not whole)))
    return {
        "rows": len(tokens_BL),
        "tokens": tokens_BL.size,
        "maskable": int(maskable_BL.sum()),
        "expected": int(expected_B.sum()),
        "selected": int(used_B.sum()),
        "prediction slots": used_BK.size,
        "shown as [MASK]": int(is_mask.sum()),
        "shown as random": len(random),
        "unchanged": int((is_kept & ~is_mask).sum()),
        "runs": int((selected_BL & ~np.pad(selected_BL, ((0, 0), (1, 0)))[:, :-1]).sum()),
        "rows short": int(short_B.sum()),
        "rows token by token": int(whole and (~fits_B & maskable_BL.any(1)).sum()),
        "words selected": int((chosen_BW > 0).sum()),
        "words cut": int(cut_BW.sum()),
        f"{BROKEN}special or [PAD] token selected": int((selected_BL & ~maskable_BL).sum()),
        f"{BROKEN}position selected twice": int((times_BL > 1).sum()),
        f"{BROKEN}row with a wrong number of predictions": int(wrong_B.sum()),
        f"{BROKEN}label that is not the original token": int((tokens_BL[row_B1, positions_BK][used_BK] != label).sum()),
        f"{BROKEN}token changed that was not selected": int(((inputs_BL != tokens_BL) & ~selected_BL).sum()),
        f"{BROKEN}special token drawn as a random one": int(tokenizer.is_special[random].sum()),
        f"{BROKEN}word cut in two": int(cut_BW.sum()) if whole else 0,
        f"{BROKEN}special token that came from text": _special_from_text(tokens_BL, tokenizer),
    }


def _special_from_text(tokens_BL: np.ndarray, tokenizer: Tokenizer) -> int:
    """Counts special tokens, the unknown one left out, that packing does not put where they are."""
    is_pad_BL, is_cls_BL, is_sep_BL = (tokens_BL == i for i in (tokenizer.pad_id, tokenizer.cls_id, tokenizer.sep_id))
    no_more_BL = np.logical_and.accumulate(is_pad_BL[:, ::-1], axis=1)[:, ::-1]  # padding up to the end
    packed_BL = no_more_BL | (is_cls_BL & np.pad(is_sep_BL, ((0, 0), (1, 0)), constant_values=True)[:, :-1])
    packed_BL |= is_sep_BL & np.pad(is_cls_BL | no_more_BL, ((0, 0), (0, 1)), constant_values=True)[:, 1:]
    return int((tokenizer.is_special[tokens_BL] & (tokens_BL != tokenizer.unk_id) & ~packed_BL).sum())


def _words(
    tokens_BL: np.ndarray, maskable_BL: np.ndarray, selected_BL: np.ndarray, tokenizer: Tokenizer
) -> tuple[np.ndarray, np.ndarray]:
    """Numbers of tokens and of selected tokens of each word, int32 (B, W); W is at most L + 1."""
    row_B1 = np.arange(len(tokens_BL))[:, None]
    after_special_BL = np.pad(~maskable_BL, ((0, 0), (1, 0)), constant_values=True)[:, :-1]
    word_BL = np.cumsum(tokenizer.word_starts(tokens_BL) | ~maskable_BL | after_special_BL, axis=1)
    size_BW, chosen_BW = np.zeros((2, len(tokens_BL), tokens_BL.shape[1] + 1), np.int32)
    np.add.at(size_BW, (row_B1, word_BL), maskable_BL)
    np.add.at(chosen_BW, (row_B1, word_BL), selected_BL)
    return size_BW, chosen_BW
