"""Shows what masking does to the training rows, and checks its laws on a million of their tokens.

    python -m flax_mlm.audit --config=configs/quickstart.py --config.objective.masking=whole_word --rows=4

The rows, their masks and their mask rates are those that training sees from its first step on, in its first phase.
Exits with 1 if a law is broken: a special token selected, a wrong number of predictions in a row, a wrong label, a
token changed that was not selected, or a word cut in two by `whole_word`.
"""

from collections import Counter
from collections.abc import Iterable
from typing import TYPE_CHECKING

import numpy as np
from absl import flags
from rich.console import Console
from rich.table import Table
from rich.text import Text

from flax_mlm.cli import app as command
from flax_mlm.config import phases
from flax_mlm.config.schema import Config
from flax_mlm.errors import UserError

if TYPE_CHECKING:
    from flax_mlm.data.tokenizer.base import Tokenizer
    from flax_mlm.objectives import masking

_ROWS = flags.DEFINE_integer("rows", 4, "rows to print", lower_bound=0)
_TOKENS = flags.DEFINE_integer("tokens", 1_000_000, "tokens to measure", lower_bound=1)


def main(config: Config) -> int:
    from flax_mlm.data import pipeline  # heavy imports wait until the flags have been parsed
    from flax_mlm.data.open import open_corpus

    phase = phases.parse_phases(config)[0]
    config = phase.config
    if config.objective.name == "clm":
        raise UserError("objective.name is 'clm', which masks nothing; the audit is for 'mlm' and 'rtd'")
    corpus = open_corpus(config)
    phase = phase.with_rows(corpus.seq_len, corpus.tokens_per_row)
    batch_size = config.train.global_batch_size
    batches = pipeline.train_batches(
        corpus.split("train"),
        seed=config.seed,
        global_batch_size=batch_size,
        start_step=0,
        stop_step=-(-_TOKENS.value // (batch_size * corpus.seq_len)),
        stream=corpus.stream(),
    )
    return audit(phase, corpus.tokenizer(), batches, _ROWS.value, Console())


def audit(
    phase: phases.Phase, tokenizer: "Tokenizer", batches: Iterable[dict[str, np.ndarray]], show: int, console: Console
) -> int:
    """Masks the batches of steps 0, 1, 2 ..., prints some rows and a report; returns 1 if a law is broken, else 0."""
    import jax
    import jax.numpy as jnp

    from flax_mlm.objectives import masking
    from flax_mlm.objectives.keys import run_key
    from flax_mlm.objectives.masking import rates_at
    from flax_mlm.objectives.vocabulary import Vocabulary

    objective, key = phase.config.objective, run_key(phase.config, "mask")
    vocab = Vocabulary.from_tokenizer(tokenizer)
    seen: Counter[str] = Counter()
    for step, batch in enumerate(batches):
        tokens = batch["tokens"]
        slots = masking.max_predictions_per_row(tokens.shape[1], phase.largest_mask_rate)
        # Of a run with a budget nobody knows yet how many steps it has.
        rates = rates_at(phase, min(step / phase.num_steps, 1.0) if phase.num_steps else 0.0)
        on_device = jnp.asarray(tokens), jnp.asarray(batch["row_ids"])
        masked = jax.device_get(masking.mask_tokens(*on_device, key, vocab, objective, rates, slots))
        if step == 0 and show:
            _show(tokenizer, tokens[:show], masked, console)
        seen.update(measure(tokens, masked, tokenizer, objective.masking, rates.mask))
    return _report(phase, seen, console)


def measure(
    tokens_BL: np.ndarray, masked: "masking.Masked", tokenizer: "Tokenizer", strategy: str, rate: float
) -> dict[str, int]:
    """Counts over one masked batch, in plain NumPy and without any code of `masking`; `broken: ...` should be 0."""
    inputs_BL, positions_BK, labels_BK, weights_BK = masked
    used_BK, row = weights_BK > 0, np.arange(len(tokens_BL))[:, None]
    maskable_BL = ~tokenizer.is_special[tokens_BL] & (tokens_BL != tokenizer.pad_id)
    times_BL = np.zeros(tokens_BL.shape, np.int32)
    np.add.at(times_BL, (np.broadcast_to(row, used_BK.shape)[used_BK], positions_BK[used_BK]), 1)
    selected_BL = times_BL > 0
    shown, label = inputs_BL[row, positions_BK][used_BK], labels_BK[used_BK]
    is_mask, is_kept = shown == tokenizer.mask_id, shown == label
    random = shown[~is_mask & ~is_kept]

    # The law, in integers: halves round up, rates count in hundred-thousandths, at least one where one is possible.
    maskable_B, used_B = maskable_BL.sum(1), used_BK.sum(1)
    units = int(np.round(np.float32(rate) * np.float32(100_000)))  # in float32, as the device has it
    wanted_B = np.maximum((units * maskable_B + 50_000) // 100_000, np.minimum(maskable_B, 1))
    short_B = used_B < wanted_B

    # Words: how many tokens each has, and how many of those are selected.
    previous_special_BL = np.roll(~maskable_BL, 1, axis=1)
    previous_special_BL[:, 0] = True
    word_BL = np.cumsum(tokenizer.starts_word[tokens_BL] | ~maskable_BL | previous_special_BL, axis=1)
    size_BW, chosen_BW = np.zeros((2, len(tokens_BL), tokens_BL.shape[1] + 1), np.int32)
    np.add.at(size_BW, (row, word_BL), maskable_BL)
    np.add.at(chosen_BW, (row, word_BL), selected_BL)
    fits_B = ((size_BW > 0) & (size_BW <= wanted_B[:, None])).any(1)
    cut_BW = (chosen_BW > 0) & (chosen_BW < size_BW) & fits_B[:, None]

    whole = strategy == "whole_word"  # may fall short, but neither cut a word nor predict nothing
    wrong_B = (used_B > wanted_B) | (short_B & ((used_B == 0) | (not whole)))
    return {
        "rows": len(tokens_BL),
        "tokens": tokens_BL.size,
        "maskable": int(maskable_B.sum()),
        "wanted": int(wanted_B.sum()),
        "selected": int(used_B.sum()),
        "slots": used_BK.size,
        "shown as [MASK]": int(is_mask.sum()),
        "shown as random": len(random),
        "kept": int((is_kept & ~is_mask).sum()),
        "runs": int((selected_BL & ~np.pad(selected_BL, ((0, 0), (1, 0)))[:, :-1]).sum()),
        "rows short": int(short_B.sum()),
        "rows token by token": int(whole and (~fits_B & (maskable_B > 0)).sum()),
        "words touched": int((chosen_BW > 0).sum()),
        "words cut": int(cut_BW.sum()),
        "broken: special or [PAD] token selected": int((selected_BL & ~maskable_BL).sum()),
        "broken: position selected twice": int((times_BL > 1).sum()),
        "broken: row with a wrong number of predictions": int(wrong_B.sum()),
        "broken: label that is not the original token": int((tokens_BL[row, positions_BK] != labels_BK)[used_BK].sum()),
        "broken: token changed that was not selected": int(((inputs_BL != tokens_BL) & ~selected_BL).sum()),
        "broken: special token drawn as a random one": int(tokenizer.is_special[random].sum()),
        "broken: word cut in two": int(cut_BW.sum()) if whole else 0,
    }


def _report(phase: phases.Phase, seen: Counter[str], console: Console) -> int:
    o = phase.config.objective

    def share(part: str, whole: str) -> str:
        return f"{100 * seen[part] / max(seen[whole], 1):.2f}%"

    ends = {path: f" → {100 * value:g}%" for path, value in phase.final_values.items()}

    def rate(name: str) -> str:
        return f"{100 * getattr(o, name):g}%{ends.get(f'objective.{name}', '')}"

    table = Table(title=f"{o.masking}: {seen['tokens']:,} tokens in {seen['rows']:,} rows", title_justify="left")
    for column in ("", "measured", "asked for"):
        table.add_column(column, justify="right" if column else "left")
    table.add_row(
        "ordinary tokens selected", share("selected", "maskable"), f"{rate('mask_rate')}, rounded in each row"
    )
    table.add_row("  shown as [MASK]", share("shown as [MASK]", "selected"), rate("mask_replace_prob"))
    table.add_row("  shown as a random token", share("shown as random", "selected"), rate("random_replace_prob"))
    table.add_row("  kept", share("kept", "selected"), f"{100 * (1 - o.mask_replace_prob - o.random_replace_prob):g}%")
    table.add_row("predictions of those due", share("selected", "wanted"), "100%")
    table.add_row("rows that fall short", share("rows short", "rows"), "" if o.masking == "whole_word" else "0%")
    table.add_row("slots in use", share("selected", "slots"), "")
    table.add_row("tokens per run of selected ones", f"{seen['selected'] / max(seen['runs'], 1):.2f}", "")
    table.add_row(
        "words selected in part", share("words cut", "words touched"), "0%" if o.masking == "whole_word" else ""
    )
    if o.masking == "whole_word":
        table.add_row("rows in which no whole word fits", share("rows token by token", "rows"), "")
    console.print(table)

    broken = {law.removeprefix("broken: "): n for law, n in seen.items() if law.startswith("broken: ") and n}
    if not seen["broken: special or [PAD] token selected"]:
        console.print("no special token was ever selected", style="green")
    for law, n in broken.items():
        console.print(Text(f"BROKEN: {law}: {n:,} times", style="bold red"))
    return 1 if broken else 0


def _show(tokenizer: "Tokenizer", tokens_BL: np.ndarray, masked: "masking.Masked", console: Console) -> None:
    """Prints rows with marks that also read without colour."""
    legend = Text("⟨■hidden⟩", style="bold red") + Text("  ") + Text("⟨original", style="strike") + Text("→random⟩")
    console.print(legend + Text("  ") + Text("⟨=kept⟩", style="underline green"), "\n", sep="")
    for b, tokens_L in enumerate(tokens_BL):
        selected = set(masked.positions_BK[b][masked.weights_BK[b] > 0].tolist())
        text = Text()
        run: list[int] = []
        for i, token in enumerate([*tokens_L.tolist(), tokenizer.pad_id]):
            special = bool(tokenizer.is_special[token])
            if not special and i not in selected:
                run.append(token)
                continue
            if run:
                text.append(_decode(tokenizer, run))
                run = []
            if token == tokenizer.pad_id and i not in selected:
                break
            _append(text, tokenizer, token, int(masked.inputs_BL[b, i]), i in selected)
        console.print(Text(f"row {b}, {len(selected)} predictions", style="bold"), text, "", sep="\n", soft_wrap=False)


def _append(text: Text, tokenizer: "Tokenizer", token: int, shown: int, selected: bool) -> None:
    """One token that is special, selected or (where the masking is broken) both."""
    original = tokenizer.tokens[token] if tokenizer.is_special[token] else _decode(tokenizer, [token])
    if not selected:
        text.append(f" {original}", style="dim")
        return
    text.append(" " if original.startswith(" ") else "")
    original = original.strip() or "▁"  # a piece that is only a space
    if shown == tokenizer.mask_id:
        text.append(f"⟨■{original}⟩", style="bold red")
    elif shown == token:
        text.append(f"⟨={original}⟩", style="underline green")
    else:
        text.append(f"⟨{original}", style="strike yellow")
        text.append(f"→{_decode(tokenizer, [shown]).strip() or '▁'}⟩", style="yellow")


def _decode(tokenizer: "Tokenizer", ids: list[int]) -> str:
    """Text of a run of pieces, with a space in front where it begins a word."""
    return (" " if tokenizer.starts_word[ids[0]] else "") + tokenizer.decode(ids).strip()


if __name__ == "__main__":
    command.run(main)
