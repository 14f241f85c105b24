"""Our recipe and transformers' own training by one clock: the same text, tokenizer, size and rows of tokens, and a loss
on the same hidden tokens of held-out rows.

    python -m benchmarks.equal_clock --config=small --config.data.source='text:wiki.txt.gz' \
        --config.data.validation_fraction=0.1 --output=runs/equal_clock

The standard is what `run_mlm.py` does: Trainer, DataCollatorForLanguageModeling, documents put one after another and
cut into blocks, a BertForMaskedLM of its default settings; with the best of several learning rates. Its time is that of
training alone. Ours is the config, with a third of that as its budget, start, compilation and evaluations included. One
after another, in processes of their own; what is there is not done again.

The held-out rows are packed as ours are. What the standard loses by that, if anything, is seen by its loss on as many
blocks of the same documents, cut as it was trained.
"""

import itertools
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
from flax_mlm.cli import app, tables
from flax_mlm.config import phases
from flax_mlm.config.schema import Config
from flax_mlm.errors import Failure, UserError
from flax_mlm.storage import files
from flax_mlm.training import metrics

_OUTPUT = flags.DEFINE_string("output", "", "folder for all that was measured")
_MINUTES = flags.DEFINE_float("minutes", 60.0, "of training, of the standard", lower_bound=0.1)
_SHARE = flags.DEFINE_float("share", 1 / 3, "of that time, ours", lower_bound=0.01)
_RATES = flags.DEFINE_list("rates", ["1e-4", "3e-4", "1e-3"], "learning rates of the standard")


def main(config: Config) -> None:
    if not _OUTPUT.value:
        raise UserError("--output is missing; name a folder, such as --output=runs/equal_clock")
    if config.data.corpus:
        raise UserError(
            f"data.corpus is '{config.data.corpus}'; name the text itself by data.source, which both are given"
        )
    if config.train.unit != "steps":
        raise UserError(f"train.{config.train.unit} is set; how long ours runs is --share of --minutes")
    try:
        rates = {rate: float(rate) for rate in _RATES.value}
    except ValueError:
        raise UserError(f"--rates is '{','.join(_RATES.value)}'; it takes learning rates such as 1e-4,3e-4") from None
    folder = Path(_OUTPUT.value).expanduser().absolute()
    folder.mkdir(parents=True, exist_ok=True)
    case_file = folder / "case.json"
    if not case_file.exists():
        write_case(config, folder)
    if json.loads(case_file.read_text()) != json.loads(json.dumps(phases.parse_phases(config)[-1].config.to_dict())):
        raise UserError(f"--output: {case_file} is of another config; name a new folder")
    seconds = 60 * _MINUTES.value
    curves = {f"transformers, {name}": standard(config, folder, rate, seconds) for name, rate in rates.items()}
    best = min(curves, key=lambda name: curves[name][-1]["loss"])
    curves["flax_mlm"] = ours(config, folder, seconds * _SHARE.value)
    plot(folder / "equal_clock.png", curves)
    print(table(curves, best))


def write_case(config: Config, folder: Path) -> None:
    """Blocks of training text, held-out rows with what is hidden in them, and the tokenizer."""
    import jax

    from flax_mlm.data.mixture import Mixture
    from flax_mlm.data.prepare import prepare
    from flax_mlm.distributed.batches import shard_rows
    from flax_mlm.distributed.mesh import make_mesh
    from flax_mlm.hf import tokenizer_json
    from flax_mlm.objectives import masking
    from flax_mlm.objectives.rows import Vocabulary, run_key
    from flax_mlm.objectives.targets import make_targets

    config = phases.parse_phases(config)[-1].config  # ours is evaluated with the objective that it ends with
    corpus = prepare(config, log=turns.say)
    tokenizer, length, o = corpus.tokenizer(), config.data.seq_len, config.objective
    parts: dict[bool, list[int]] = {False: [], True: []}
    for is_held_out, text in documents(config):
        parts[is_held_out] += [tokenizer.cls_id, *tokenizer.encode([text])[0], tokenizer.sep_id]
    blocks, held_out = (np.array(ids[: len(ids) // length * length], np.int32) for ids in parts.values())
    np.save(folder / "blocks.npy", blocks.reshape(-1, length))

    numbers = np.concatenate(Mixture({"": corpus}).held_out(config.eval.max_rows))
    held_out = held_out.reshape(-1, length)[: len(numbers)]
    key, vocab = run_key(config, "eval"), Vocabulary.from_tokenizer(tokenizer)
    slots, rates = (
        masking.max_predictions_per_row(length, config.eval.mask_rate),
        masking.rates(o, config.eval.mask_rate),
    )
    mesh = make_mesh(config.mesh)
    with jax.set_mesh(mesh):
        hide = jax.jit(lambda rows: make_targets(o, rows, key, vocab, rates, slots))
        for name, tokens in ("blocks", held_out), ("rows", corpus.split("validation").read(numbers)):
            row_ids = np.stack([numbers >> 32, numbers & 0xFFFFFFFF], axis=1).astype(np.uint32)[: len(tokens)]
            t = jax.device_get(hide(shard_rows({"tokens": tokens, "row_ids": row_ids}, mesh)))
            is_real = t.segment_ids_BL > 0 if name == "rows" else np.ones_like(tokens)
            with files.replacing(folder / f"{name}.npz") as new, new.open("wb") as file:
                np.savez(file, inputs=t.inputs_BL, labels=case.labels(t), real=is_real)
    (folder / "tokenizer").mkdir(exist_ok=True)
    (folder / "tokenizer" / "tokenizer.json").write_bytes(tokenizer_json.content(tokenizer, 1))
    files.write_json(folder / "tokenizer" / "tokenizer_config.json", tokenizer_json.settings(tokenizer, length, 0))
    files.write_json(folder / "case.json", config.to_dict())  # the last: all is there


def documents(config: Config) -> Iterator[tuple[bool, str]]:
    """Every document, and whether it is held out."""
    from flax_mlm.data.sources.open import open_source

    chunks = open_source(config.data.source).chunks()
    for (_, value), document in itertools.groupby(chunks, lambda chunk: (chunk.document, chunk.hash)):
        yield value < config.data.validation_fraction, "".join(chunk.text for chunk in document)


def standard(config: Config, folder: Path, rate: float, seconds: float) -> list[dict[str, float]]:
    """The curve of transformers' training. Raises Failure."""
    m, file = config.model, folder / f"transformers-{rate:g}.json"
    spec = {
        "seconds": seconds, "every": seconds / 24, "rows": config.train.global_batch_size, "learning_rate": rate,
        "seed": config.seed, "bert": {
            "num_hidden_layers": m.num_layers, "hidden_size": m.hidden_size, "intermediate_size": 4 * m.hidden_size,
            "num_attention_heads": m.num_heads,
        },
    }  # fmt: skip
    if curve := kept(file, spec):
        return curve
    python, curve = turns.python_of("torch"), []
    with tempfile.TemporaryDirectory() as scratch:
        told = json.dumps({**spec, "folder": str(folder), "scratch": scratch})
        line = [python, "-m", "benchmarks.workers.trainer", told]
        try:
            run = subprocess.Popen(line, cwd=turns.ROOT, stdout=subprocess.PIPE, text=True, env=turns.ENVIRONMENT)
        except FileNotFoundError:
            raise UserError(f"{python} is missing; run `bash benchmarks/setup.sh`") from None
        assert run.stdout
        for point in map(json.loads, run.stdout):
            turns.say(f"transformers, {rate:g}: {point}")
            curve.append(point)
    if run.wait():
        raise Failure(f"transformers' training with learning rate {rate:g} failed ({run.returncode})")
    files.write_json(file, {"spec": spec, "curve": curve})
    return curve


def kept(file: Path, spec: dict[str, Any]) -> list[dict[str, float]]:
    """The curve that was measured before, or none. Raises UserError: with other settings."""
    if not file.exists():
        return []
    found = json.loads(file.read_text())
    if found["spec"] != json.loads(json.dumps(spec)):
        raise UserError(f"--output: {file} is of other settings; name a new folder")
    return found["curve"]


def ours(config: Config, folder: Path, seconds: float) -> list[dict[str, float]]:
    """Our curve. Raises Failure."""
    workdir, file = folder / "flax_mlm", folder / "flax_mlm.json"
    told = config.to_dict()
    told["data"]["source"] = Path(config.data.source).name  # a curve may be kept where the text lies elsewhere
    spec = {"seconds": seconds, "config": told}
    if curve := kept(file, spec):
        return curve
    shutil.rmtree(workdir, ignore_errors=True)
    budget = f"--config.train.budget_minutes={seconds / 60!r}"
    line = [sys.executable, "-m", "flax_mlm.train", *app.config_arguments(sys.argv), budget]
    code = subprocess.run([*line, f"--workdir={workdir}"], stdout=sys.stderr, env=turns.ENVIRONMENT).returncode
    if code:
        raise Failure(f"our training failed ({code})")
    lines = metrics.lines(workdir, "validation")
    asked = int((np.load(folder / "rows.npz")["labels"] >= 0).sum())
    if lines[-1]["predicted_tokens"] != asked:
        raise Failure(
            f"ours was evaluated on {lines[-1]['predicted_tokens']:,} hidden tokens, the standard on {asked:,}"
        )
    curve = [
        {"step": line["step"], "seconds": line["budget_seconds"], "loss": line["loss"], "accuracy": line["accuracy"]}
        for line in lines
    ]
    files.write_json(file, {"spec": spec, "curve": curve})
    return curve


def table(curves: dict[str, list[dict[str, Any]]], best: str) -> str:
    """Markdown, and in a sentence when ours was as good as the best of the standard's."""
    rows = [
        [name, f"{c[-1]['seconds'] / 60:.1f}", f"{c[-1]['step']:,}", f"{c[-1]['loss']:.3f}", f"{c[-1]['accuracy']:.3f}"]
        for name, c in curves.items()
    ]
    target = curves[best][-1]
    own = target["loss_of_blocks"]
    reached = next((point for point in curves["flax_mlm"] if point["loss"] <= target["loss"]), None)
    said = f"{best} comes to {target['loss']:.3f} in {target['seconds'] / 60:.1f} minutes of training; "
    if reached:
        said += (
            f"ours is there after {reached['seconds'] / 60:.1f}, {target['seconds'] / reached['seconds']:.1f} times "
        )
        said += "sooner."
    else:
        said += "ours does not get there."
    said += f" On blocks of its own kind its loss is {own:.3f}."
    return f"{tables.markdown(['', 'minutes', 'steps', 'held-out loss', 'accuracy'], rows)}\n\n{said}"


def plot(file: Path, curves: dict[str, list[dict[str, Any]]]) -> None:
    """Held-out loss against minutes of training."""
    with tables.figure(file, 1, 1, (8, 5)) as (figure, axes):
        axis = axes.flat[0]
        for name, curve in curves.items():
            points = [(p["seconds"] / 60, p["loss"]) for p in curve if p["step"]]
            axis.plot(*zip(*points, strict=True), marker=".", label=name)
        axis.set_xlabel("minutes")
        axis.set_ylabel("held-out loss, nats")
        axis.grid(alpha=0.3)
        figure.legend(loc="outside lower center", ncols=2)


if __name__ == "__main__":
    app.run(main)
