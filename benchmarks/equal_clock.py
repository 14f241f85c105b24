"""Our recipe and transformers' own training by one clock: the same text, tokenizer, size and rows of tokens, and a loss
on the same hidden tokens of held-out rows.

    python -m benchmarks.equal_clock --config=configs/small.py --config.data.source='text:wiki.txt.gz' \
        --config.data.validation_every=10 --output=runs/equal_clock

The standard is what `run_mlm.py` does: Trainer, DataCollatorForLanguageModeling, documents put one after another and
cut into blocks, a BertForMaskedLM of its default settings; with the best of several learning rates. Ours is the config,
with a third of the time as its budget, start and evaluations included. One after another, in processes of their own;
what is there is not done again.
"""

import json
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
from absl import flags

from benchmarks import case, turns
from flax_mlm import command, files, metrics, tables
from flax_mlm.config import Config
from flax_mlm.errors import Failure, UserError

_OUTPUT = flags.DEFINE_string("output", "", "folder for all that was measured")
_MINUTES = flags.DEFINE_float("minutes", 60.0, "of training, of the standard", lower_bound=0.1)
_SHARE = flags.DEFINE_float("share", 1 / 3, "of that time, ours", lower_bound=0.01)
_RATES = flags.DEFINE_list("rates", ["3e-4", "1e-3", "3e-3"], "learning rates of the standard")


def main(config: Config) -> None:
    if not _OUTPUT.value:
        raise UserError("--output is missing; name a folder, such as --output=runs/equal_clock")
    folder = Path(_OUTPUT.value).expanduser().absolute()
    folder.mkdir(parents=True, exist_ok=True)
    if not (folder / "questions.npz").exists():
        write_case(config, folder)
    seconds = 60 * _MINUTES.value
    curves = {f"transformers, {rate}": standard(config, folder, float(rate), seconds) for rate in _RATES.value}
    best = min(curves, key=lambda name: curves[name][-1]["loss"])
    curves["flax_mlm"] = ours(folder, seconds * _SHARE.value)
    files.write_json(folder / "curves.json", curves)
    plot(folder / "equal_clock.png", curves)
    print(table(curves, best))


def write_case(config: Config, folder: Path) -> None:
    """Blocks of training text, held-out rows with what is hidden in them, and the tokenizer."""
    import jax

    from flax_mlm import masking, objective, sharding
    from flax_mlm.data.mixture import Mixture
    from flax_mlm.data.pipeline import eval_batches
    from flax_mlm.hf import tokenizer_json
    from flax_mlm.prepare import prepare_cached
    from flax_mlm.step import run_key

    corpus = prepare_cached(config, turns.say)
    tokenizer, length = corpus.tokenizer(), config.data.seq_len
    ids = np.concatenate(
        [[tokenizer.cls_id, *tokenizer.encode([text])[0], tokenizer.sep_id] for text in training_documents(config)]
    )
    blocks = ids[: len(ids) // length * length].reshape(-1, length).astype(np.int32)
    np.save(folder / "blocks.npy", blocks)

    rows, numbers = corpus.split("validation"), np.concatenate(Mixture({"": corpus}).held_out(config.eval.max_rows))
    o, key, vocab = config.objective, run_key(config, "eval"), masking.vocabulary(tokenizer)
    slots, rates = masking.num_slots(length, config.eval.mask_rate), masking.rates(o, config.eval.mask_rate)
    found = []
    mesh = sharding.make_mesh(config.mesh)
    with jax.set_mesh(mesh):
        hide = jax.jit(lambda rows: objective.targets(o, rows, key, vocab, rates, slots))
        for batch in eval_batches(rows, numbers, batch_size=config.eval.batch_size):
            valid = batch.pop("valid")
            t = jax.device_get(hide(sharding.split_rows(batch, mesh)))
            found.append([x[valid] for x in (t.inputs_BL, case.labels(t), t.segment_ids_BL > 0)])
    (folder / "tokenizer").mkdir(exist_ok=True)
    (folder / "tokenizer" / "tokenizer.json").write_bytes(tokenizer_json.content(tokenizer, 1))
    files.write_json(folder / "tokenizer" / "tokenizer_config.json", tokenizer_json.settings(tokenizer, length))
    inputs, labels, real = map(np.concatenate, zip(*found, strict=True))
    with files.replacing(folder / "questions.npz") as new, new.open("wb") as file:  # the last: all is there
        np.savez(file, inputs=inputs, labels=labels, real=real)


def training_documents(config: Config) -> Iterator[str]:
    from collections import Counter

    from flax_mlm.data import sources

    last, text = 0, ""
    for number, part in sources.documents(config.data.source).parts(Counter()):
        if number != last:
            if (last + 1) % config.data.validation_every:
                yield text
            last, text = number, ""
        text += part
    if (last + 1) % config.data.validation_every:
        yield text


def standard(config: Config, folder: Path, rate: float, seconds: float) -> list[dict[str, float]]:
    """The curve of transformers' training. Raises Failure."""
    file = folder / f"transformers-{rate:g}.jsonl"
    if not file.exists():
        python, m = turns.python_of("torch"), config.model
        with tempfile.TemporaryDirectory() as scratch, files.replacing(file) as new, new.open("w") as lines:
            spec = {
                "folder": str(folder), "scratch": scratch, "seconds": seconds, "every": seconds / 24,
                "rows": config.train.global_batch_size, "learning_rate": rate, "seed": config.seed,
                "bert": {
                    "num_hidden_layers": m.num_layers, "hidden_size": m.hidden_size, "intermediate_size":
                    4 * m.hidden_size, "num_attention_heads": m.num_heads,
                },
            }  # fmt: skip
            line = [python, "-m", "benchmarks.workers.trainer", json.dumps(spec)]
            try:
                code = subprocess.run(line, cwd=turns.ROOT, stdout=lines, env=turns.ENVIRONMENT).returncode
            except FileNotFoundError:
                raise UserError(f"{python} is missing; run `bash benchmarks/setup.sh`") from None
            if code:
                raise Failure(f"transformers' training with learning rate {rate:g} failed ({code})")
    return [json.loads(line) for line in file.read_text().splitlines()]


def ours(folder: Path, seconds: float) -> list[dict[str, float]]:
    """Our curve. Raises Failure."""
    workdir = folder / "flax_mlm"
    if not (workdir / "result.json").exists():
        shutil.rmtree(workdir, ignore_errors=True)
        budget = f"--config.train.budget_minutes={seconds / 60!r}"
        line = [sys.executable, "-m", "flax_mlm.train", *command.config_arguments(sys.argv), budget]
        code = subprocess.run([*line, f"--workdir={workdir}"], stdout=sys.stderr, env=turns.ENVIRONMENT).returncode
        if code:
            raise Failure(f"our training failed ({code})")
    return [
        {"step": line["step"], "seconds": line["train_seconds"], "loss": line["loss"], "accuracy": line["accuracy"]}
        for line in metrics.lines(workdir, "validation")
    ]


def table(curves: dict[str, list[dict[str, Any]]], best: str) -> str:
    """Markdown, and in a sentence when ours was as good as the best of the standard's."""
    rows = [
        [name, f"{c[-1]['seconds'] / 60:.1f}", f"{c[-1]['step']:,}", f"{c[-1]['loss']:.3f}", f"{c[-1]['accuracy']:.3f}"]
        for name, c in curves.items()
    ]
    target = curves[best][-1]
    reached = next((point for point in curves["flax_mlm"] if point["loss"] <= target["loss"]), None)
    said = f"{best} comes to {target['loss']:.3f} in {target['seconds'] / 60:.1f} minutes of training; "
    if reached:
        said += (
            f"ours is there after {reached['seconds'] / 60:.1f}, {target['seconds'] / reached['seconds']:.1f} times "
        )
        said += "sooner."
    else:
        said += "ours does not get there."
    return f"{tables.markdown(['', 'minutes', 'steps', 'held-out loss', 'accuracy'], rows)}\n\n{said}"


def plot(file: Path, curves: dict[str, list[dict[str, Any]]]) -> None:
    """Held-out loss against minutes of training."""
    with tables.figure(file, 1, 1, (8, 5)) as (figure, axes):
        axis = axes.flat[0]
        for name, curve in curves.items():
            points = [(p["seconds"] / 60, p["loss"]) for p in curve if p["step"]]
            axis.plot(*zip(*points, strict=True), marker=".", label=name)
        axis.set_xlabel("minutes of training")
        axis.set_ylabel("held-out loss, nats")
        axis.grid(alpha=0.3)
        figure.legend(loc="outside lower center", ncols=2)


if __name__ == "__main__":
    command.run(main)
