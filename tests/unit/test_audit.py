"""The audit prints rows and rates, and reports every law of masking that is broken."""

import io
import re

import jax.numpy as jnp
import numpy as np
import pytest
from rich.console import Console

from flax_mlm import audit
from flax_mlm.config import phases
from flax_mlm.config.load import build
from flax_mlm.configs import base
from flax_mlm.objectives import audit as audit_lib
from flax_mlm.objectives import masking
from flax_mlm.objectives.rows import Vocabulary, row_keys, run_key

L = 32
TOKENS = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *(f"▁w{i}" for i in range(40)), *(f"c{i}" for i in range(20))]


class FakeTokenizer:
    tokens = TOKENS
    is_special = np.arange(len(TOKENS)) < 5
    starts_word = np.array([p[0] in "▁[" for p in TOKENS])
    ends_word = np.zeros(len(TOKENS), bool)
    pad_id, unk_id, cls_id, sep_id, mask_id = range(5)

    def word_starts(self, ids):
        return self.starts_word[ids]

    def decode(self, ids):
        return "".join(TOKENS[i] for i in ids).replace("▁", " ").strip()


def make_config(**objective):
    c = base.get_config()
    c.objective.update(objective)
    return build(c)


def batches(steps=2, rows=64):
    rng = np.random.default_rng(0)
    for step in range(steps):
        tokens = rng.integers(5, len(TOKENS), (rows, L)).astype(np.int32)
        tokens[:, 0], tokens[:, -3], tokens[:, -2:] = 2, 3, 0
        number = np.arange(step * rows, (step + 1) * rows)
        yield {"tokens": tokens, "row_ids": np.stack([number * 0, number], 1).astype(np.uint32)}


def run(show=2, **objective):
    console = Console(file=io.StringIO(), width=120, color_system=None)
    code = audit.audit(phases.single_phase(make_config(**objective)), FakeTokenizer(), batches(), show, console)
    return code, console.file.getvalue()


@pytest.mark.parametrize("strategy", ["token", "whole_word", "span"])
def test_sound_masking_passes(strategy):
    code, text = run(masking=strategy)
    assert code == 0, text
    assert "no special token was ever selected" in text
    assert "BROKEN" not in text
    assert f"{strategy}: 4,096 tokens in 128 rows" in text
    selected = float(re.search(r"ordinary tokens selected\W+([\d.]+)%", text)[1])
    assert selected == pytest.approx(100 * 4 / 28, abs=0.5)  # round(0.15 * 28) of 28


def test_marks_read_without_colour():
    text = run(mask_replace_prob=0.4, random_replace_prob=0.3)[1]
    rows = text[: text.index("ordinary tokens")].split("row 0")[1]
    assert "8 predictions" not in rows
    assert "4 predictions" in rows
    assert len(re.findall(r"⟨■\w+⟩|⟨\w+→\w+⟩|⟨=\w+⟩", rows)) == 8  # two rows of four
    for mark in ("⟨■", "→", "⟨="):
        assert mark in text
    assert "[CLS]" in rows
    assert "[SEP]" in rows
    assert "[PAD]" not in rows


def test_printed_masks_are_those_of_training():
    config = make_config()
    batch = next(iter(batches()))
    K = masking.max_predictions_per_row(L, 0.15)
    vocab = Vocabulary.from_tokenizer(FakeTokenizer())
    keys = row_keys(run_key(config, "mask"), jnp.asarray(batch["row_ids"]))
    rates = masking.rates(config.objective, 0.15)
    expected = masking.mask_tokens(jnp.asarray(batch["tokens"]), keys, vocab, config.objective, rates, K)
    first = expected.positions_BK[0][expected.weights_BK[0] > 0]
    row = run(show=1)[1].split("[CLS]")[1].split("[SEP]")[0]
    labels = [TOKENS[t].strip("▁") for t in batch["tokens"][0][np.asarray(first)]]
    assert re.findall(r"⟨[■=]?(\w+)", row) == labels


def select_specials(m, tokens):
    return m._replace(positions_BK=m.positions_BK.at[:, 0].set(0), labels_BK=m.labels_BK.at[:, 0].set(tokens[:, 0]))


BREAKAGES = {
    "special or \\[PAD\\] token selected": select_specials,
    "position selected twice": lambda m, _: m._replace(positions_BK=m.positions_BK.at[:, 1].set(m.positions_BK[:, 0])),
    "wrong number of predictions": lambda m, _: m._replace(weights_BK=m.weights_BK.at[3, 0].set(0.0)),
    "label that is not the original": lambda m, _: m._replace(labels_BK=m.labels_BK.at[0, 0].add(1)),
    "token changed that was not selected": lambda m, _: m._replace(inputs_BL=m.inputs_BL.at[:, -1].set(7)),
    "special token drawn": lambda m, t: m._replace(inputs_BL=jnp.where(m.inputs_BL == t, t, 1)),
    "word cut in two": lambda m, _: m,
}


@pytest.mark.parametrize("law", BREAKAGES)
def test_broken_masking_exits_with_1(monkeypatch, law):
    sound, strategy = masking.mask_tokens, "whole_word" if "word" in law else "token"

    def broken(tokens_BL, keys_B, vocab, objective, *rest):
        if strategy == "whole_word":  # the audit expects whole words, and gets tokens
            objective = make_config(masking="token").objective
        return BREAKAGES[law](sound(tokens_BL, keys_B, vocab, objective, *rest), tokens_BL)

    monkeypatch.setattr(masking, "mask_tokens", broken)
    code, text = run(masking=strategy)
    assert code == 1
    assert re.search("BROKEN: .*" + law, text), text
    assert ("no special token was ever selected" in text) == ("PAD" not in law)


@pytest.mark.parametrize(("row", "found"), [
    ([2, 7, 3, 2, 8, 3, 0, 0], 0),
    ([2, 7, 3, 2, 8, 9, 9, 3], 0),
    ([2, 7, 1, 1, 8, 3, 0, 0], 0),  # unknown tokens come from text
    ([2, 7, 2, 9, 8, 3, 0, 0], 1),
    ([2, 7, 3, 9, 8, 3, 0, 0], 1),
    ([2, 7, 0, 9, 8, 3, 0, 0], 1),
    ([2, 7, 4, 9, 8, 3, 0, 0], 1),
    ([2, 7, 2, 9, 3, 9, 0, 3], 3),
])  # fmt: skip
def test_special_tokens_that_came_from_text_are_counted(row, found):
    tokens = np.array([row], np.int32)
    counts = audit_lib.measure(tokens, nothing(tokens), FakeTokenizer(), "token", 0.0)
    assert counts[f"{audit_lib.BROKEN}special token that came from text"] == found


def nothing(tokens):
    """No prediction."""
    empty = np.zeros((len(tokens), 1), np.int32)
    return masking.Masked(tokens, empty, empty, empty.astype(np.float32))
