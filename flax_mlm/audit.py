"""Prints training rows with their masks, and checks the laws of masking on a million tokens.

    python -m flax_mlm.audit --config=quickstart --config.objective.masking=whole_word --rows=4

Rows, masks and mask rates are those of training from its first step on, in its first phase. The exit code is 1 if a
law is broken: a special token selected, a wrong number of predictions in a row, a wrong label, a token changed that was
not selected, a word cut in two by `whole_word`, or a special token that came from text.
"""

from collections import Counter
from collections.abc import Iterable
from itertools import groupby
from typing import Any

import numpy as np
from absl import flags
from rich.console import Console
from rich.table import Column, Table
from rich.text import Text

from flax_mlm.cli import app
from flax_mlm.config import phases
from flax_mlm.config.schema import Config, MeshConfig
from flax_mlm.data.tokenizer import Tokenizer
from flax_mlm.errors import UserError

Batches = Iterable[dict[str, np.ndarray]]  # from data.pipeline

_ROWS = flags.DEFINE_integer("rows", 4, "number of rows to print", lower_bound=0)
_TOKENS = flags.DEFINE_integer("tokens", 1_000_000, "number of tokens to check", lower_bound=1)


def main(config: Config) -> int:
    from flax_mlm.data import mixture, pipeline  # heavy imports wait until the flags have been parsed

    phase = phases.parse_phases(config)[0]
    config = phase.config
    if config.objective.name == "clm":
        raise UserError("objective.name is 'clm'; expected 'mlm' or 'rtd': 'clm' masks nothing to audit")
    corpus = mixture.open_corpus(config)
    mixture.check_words(config, corpus, print)
    phase = phase.with_rows(corpus.seq_len, corpus.tokens_per_row)
    size = config.train.global_batch_size
    steps = -(-_TOKENS.value // (size * corpus.seq_len))
    rows, order = corpus.split("train"), corpus.stream()
    batches = pipeline.train_batches(rows, seed=config.seed, global_batch_size=size, stop_step=steps, stream=order)
    return audit(phase, corpus.tokenizer(), batches, _ROWS.value, Console())


def audit(phase: phases.Phase, tokenizer: Tokenizer, batches: Batches, rows: int, console: Console) -> int:
    """Masks the batches of steps 0, 1, 2 ..., and prints some rows and a report.

    Args:
      rows: number of rows to print.

    Returns:
      The exit code: 1 if a law is broken, else 0.
    """
    import jax
    import jax.numpy as jnp

    from flax_mlm.distributed.mesh import make_mesh, use_mesh
    from flax_mlm.objectives import masking
    from flax_mlm.objectives.audit import measure
    from flax_mlm.objectives.rows import Vocabulary, row_keys, run_key

    objective, counts = phase.config.objective, Counter[str]()
    with use_mesh(make_mesh(MeshConfig(1, 1, 1), jax.local_devices()[:1])):
        key, vocab = run_key(phase.config, "mask"), Vocabulary.from_tokenizer(tokenizer)
        for step, batch in enumerate(batches):
            tokens_BL = batch["tokens"]
            K = masking.max_predictions_per_row(tokens_BL.shape[1], phase.largest_mask_rate)
            # The number of steps of a run with a budget is not known.
            rates = masking.rates_at(phase, min(step / phase.num_steps, 1.0) if phase.num_steps else 0.0)
            keys_B = row_keys(key, jnp.asarray(batch["row_ids"]))
            masked = jax.device_get(masking.mask_tokens(jnp.asarray(tokens_BL), keys_B, vocab, objective, rates, K))
            if step == 0 and rows:
                _print_rows(tokenizer, tokens_BL[:rows], masked, console)
            counts.update(measure(tokens_BL, masked, tokenizer, objective.masking, rates.mask))
    return _report(phase, counts, console)


def _report(phase: phases.Phase, counts: Counter[str], console: Console) -> int:
    """Prints measured and expected rates, and every broken law; returns the exit code."""
    from flax_mlm.objectives.audit import BROKEN

    objective = phase.config.objective
    whole = objective.masking == "whole_word"

    def percent(name: str, total: str) -> str:
        return f"{100 * counts[name] / max(counts[total], 1):.2f}%"

    def rate(name: str) -> str:
        final = phase.final_values.get(f"objective.{name}")
        return f"{100 * getattr(objective, name):g}%" + ("" if final is None else f" → {100 * final:g}%")

    title = f"{objective.masking}: {counts['tokens']:,} tokens in {counts['rows']:,} rows"
    right = (Column(name, justify="right") for name in ("measured", "expected"))
    table = Table("", *right, title=title, title_justify="left")
    kept = f"{100 * (1 - objective.mask_replace_prob - objective.random_replace_prob):g}%"
    for row in (
        ("ordinary tokens selected", percent("selected", "maskable"), f"{rate('mask_rate')}, rounded in each row"),
        ("  shown as [MASK]", percent("shown as [MASK]", "selected"), rate("mask_replace_prob")),
        ("  shown as a random token", percent("shown as random", "selected"), rate("random_replace_prob")),
        ("  unchanged", percent("unchanged", "selected"), kept),
        ("predictions made, of those expected", percent("selected", "expected"), "100%"),
        ("rows with too few predictions", percent("rows short", "rows"), "" if whole else "0%"),
        ("prediction slots in use", percent("selected", "prediction slots"), ""),
        ("tokens per run of selected tokens", f"{counts['selected'] / max(counts['runs'], 1):.2f}", ""),
        ("words selected in part", percent("words cut", "words selected"), "0%" if whole else ""),
        *([("rows in which no whole word fits", percent("rows token by token", "rows"), "")] if whole else []),
    ):
        table.add_row(*row)
    console.print(table)

    broken = {name.removeprefix(BROKEN): n for name, n in counts.items() if name.startswith(BROKEN) and n}
    for law, kept in (
        ("special or [PAD] token selected", "no special token was ever selected"),
        ("special token that came from text", "no special token came from text"),
    ):
        if not counts[BROKEN + law]:
            console.print(kept, style="green")
    for law, n in broken.items():
        console.print(Text(f"BROKEN: {law}: {n:,} times", style="bold red"))
    return 1 if broken else 0


def _print_rows(tokenizer: Tokenizer, tokens_BL: np.ndarray, masked: Any, console: Console) -> None:
    """Prints rows and their `Masked`, with marks that can be read without colour."""
    marks = ("⟨■masked⟩", "bold red"), ("  ", ""), ("⟨original→random⟩", "yellow"), ("  ", "")
    console.print(Text.assemble(*marks, ("⟨=unchanged⟩", "underline green")), "\n", sep="")
    for b, tokens_L in enumerate(tokens_BL.tolist()):
        selected = set(masked.positions_BK[b][masked.weights_BK[b] > 0].tolist())
        text = Text()
        marked = [i in selected or bool(tokenizer.is_special[token]) for i, token in enumerate(tokens_L)]
        indices = [i for i, token in enumerate(tokens_L) if token != tokenizer.pad_id or i in selected]
        for is_marked, run in groupby(indices, marked.__getitem__):
            if not is_marked:
                text.append(_decode(tokenizer, [tokens_L[i] for i in run]))
                continue
            for i in run:
                _append_marked(text, tokenizer, tokens_L[i], int(masked.inputs_BL[b, i]), i in selected)
        console.print(Text(f"row {b}, {len(selected)} predictions", style="bold"), text, "", sep="\n", soft_wrap=False)


def _append_marked(text: Text, tokenizer: Tokenizer, token: int, shown: int, is_selected: bool) -> None:
    """Appends a token that is special, selected or, where masking is broken, both."""
    original = tokenizer.tokens[token] if tokenizer.is_special[token] else _decode(tokenizer, [token])
    if not is_selected:
        text.append(f" {original}", style="dim")
        return
    text.append(" " if original.startswith(" ") else "")
    original = original.strip() or "▁"  # a token that is only a space
    if shown == tokenizer.mask_id:
        text.append(f"⟨■{original}⟩", style="bold red")
    elif shown == token:
        text.append(f"⟨={original}⟩", style="underline green")
    else:
        text.append(f"⟨{original}→{_decode(tokenizer, [shown]).strip() or '▁'}⟩", style="yellow")


def _decode(tokenizer: Tokenizer, ids: list[int]) -> str:
    """Text of consecutive tokens, with a space in front where they begin a word."""
    return (" " if tokenizer.starts_word[ids[0]] else "") + tokenizer.decode(ids).strip()


if __name__ == "__main__":
    app.run(main)
