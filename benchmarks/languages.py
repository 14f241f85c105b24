"""What `data.sampling_alpha` is worth: bits per byte of each language, from small to large, at several alphas.

    python -m benchmarks.languages --config=quickstart --output=runs/languages --names=en,mt \
        --config.data.source='text:en.txt|text:mt.txt' --json=languages.json > languages.md

Each source of `data.source` is a language. All runs share one tokenizer, that of the lowest alpha, so that they differ
in nothing but the rows that they read. They are evaluated on all held-out rows, one after another, in processes of
their own; what is in --output is not done again. For the tokens per word, a tokenizer is trained at each alpha.
"""

import dataclasses
import json
import statistics
import subprocess
import sys
from pathlib import Path
from typing import Any

from absl import flags

from benchmarks import turns
from flax_mlm.cli import app, tables
from flax_mlm.config.schema import Config
from flax_mlm.errors import Failure, UserError
from flax_mlm.storage import files

_NAMES = flags.DEFINE_list("names", [], "of the languages, in the order of data.source")
_ALPHAS = flags.DEFINE_list("alphas", ["1", "0.7", "0.3"], "values of data.sampling_alpha")
_ROUNDS = flags.DEFINE_integer("rounds", 1, "runs with each, of different seeds", lower_bound=1)
_OUTPUT = flags.DEFINE_string("output", "", "folder for tokenizers, corpora and runs")
_JSON = flags.DEFINE_string("json", "", "file for all that was measured")


def main(config: Config) -> None:
    folder = app.required_folder("output", "name a folder, such as --output=runs/languages").absolute()
    sources = [source.strip() for source in config.data.source.split("|")]
    if len(sources) != len(_NAMES.value):
        what = f"--names has {len(_NAMES.value)} names, and data.source {len(sources)} sources, joined by |"
        raise UserError(f"{what}; expected as many")
    alphas = sorted({_alpha(text) for text in _ALPHAS.value}, reverse=True)
    folder.mkdir(parents=True, exist_ok=True)
    fertility = {alpha: _tokenizer(config, alpha, folder) for alpha in alphas}
    shared = folder / f"tokenizer-{alphas[-1]:g}"
    for name, source in zip(_NAMES.value, sources, strict=True):
        _prepare(config, source, shared, folder / "corpora" / name)
    runs = {alpha: [_run(alpha, seed, folder) for seed in range(_ROUNDS.value)] for alpha in alphas}
    rows, epochs = _reading(folder / "corpora", runs)
    record = {
        "machine": turns.machine(), "config": config.to_dict(), "names": _NAMES.value, "rows": rows,
        "epochs": epochs, "fertility": fertility, "results": runs,
    }  # fmt: skip
    print(table(record))
    if _JSON.value:
        files.write_json(Path(_JSON.value), record)


def _alpha(text: str) -> float:
    try:
        return float(text)
    except ValueError:
        raise UserError(f"--alphas has '{text}'; expected numbers such as 1,0.7,0.3") from None


def _tokenizer(config: Config, alpha: float, folder: Path) -> dict[str, float]:
    """Trains the tokenizer of an alpha. Returns the tokens per word of each language."""
    from flax_mlm.data.shared_tokenizer import SOURCES, make_tokenizer

    data = dataclasses.replace(config.data, sampling_alpha=alpha)
    output = folder / f"tokenizer-{alpha:g}"
    make_tokenizer(dataclasses.replace(config, data=data), output, turns.say)
    about = json.loads((output / SOURCES).read_text())["sources"].values()
    return {name: each["tokens_per_word"] for name, each in zip(_NAMES.value, about, strict=True)}


def _prepare(config: Config, source: str, tokenizer: Path, output: Path) -> None:
    """Makes the corpus of a language."""
    from flax_mlm.data.prepare import prepare

    data = dataclasses.replace(config.data, source=source)
    with_path = dataclasses.replace(config.tokenizer, path=str(tokenizer))
    prepare(dataclasses.replace(config, data=data, tokenizer=with_path), output, turns.say)


def _run(alpha: float, seed: int, folder: Path) -> dict[str, float]:
    """Trains with an alpha. Returns the held-out result. Raises Failure."""
    workdir = folder / f"alpha-{alpha:g}-seed-{seed}"
    named = [argument for argument in app.config_arguments(sys.argv) if not argument.startswith("--config.data.source")]
    values = {"data.corpus": folder / "corpora" / "*", "data.sampling_alpha": alpha, "seed": seed, "eval.max_rows": 0}
    overrides = [f"--config.{name}={value}" for name, value in values.items()]
    line = [sys.executable, "-m", "flax_mlm.train", *named, *overrides, f"--workdir={workdir}"]
    if code := subprocess.run(line, cwd=turns.ROOT, stdout=sys.stderr, env=turns.ENVIRONMENT).returncode:
        raise Failure(f"the training with data.sampling_alpha={alpha:g} failed ({code})")
    return json.loads((workdir / "result.json").read_text())


def _reading(corpora: Path, runs: dict[float, Any]) -> tuple[dict[str, int], dict[float, dict[str, float]]]:
    """Rows of each language, and how often each alpha's runs read them."""
    from flax_mlm.data.corpus import Corpus
    from flax_mlm.training import metrics

    rows = {name: Corpus.open(corpora / name).counts["train"]["rows"] for name in _NAMES.value}
    last = {alpha: metrics.lines(corpora.parent / f"alpha-{alpha:g}-seed-0", "train")[-1] for alpha in runs}
    return rows, {alpha: {name: line[f"epochs/{name}"] for name in rows} for alpha, line in last.items()}


def table(record: dict[str, Any]) -> str:
    """Markdown: languages by size; bits per byte and epochs at each alpha, and tokens per word of its own tokenizer."""
    rows, results = record["rows"], record["results"]
    head = ["language", "rows", *(f"α = {alpha:g}" for alpha in results), "epochs", "tokens per word"]
    lines, means = [], {alpha: 0.0 for alpha in results}
    for name in sorted(rows, key=rows.__getitem__, reverse=True):
        bits = []
        for alpha, some in results.items():
            mean = statistics.mean(run[f"bits_per_byte/{name}"] for run in some)
            relative = statistics.mean(run[f"loss_stderr/{name}"] / run[f"loss/{name}"] for run in some)
            bits.append(f"{mean:.3f} ± {relative * mean:.3f}")
            means[alpha] += mean / len(rows)
        epochs = ", ".join(f"{record['epochs'][alpha][name]:.2g}" for alpha in results)
        words = ", ".join(f"{record['fertility'][alpha][name]:.2f}" for alpha in results)
        lines.append([name, f"{rows[name]:,}", *bits, epochs, words])
    lines.append(["mean of the languages", "", *(f"{mean:.3f}" for mean in means.values()), "", ""])
    return f"{tables.markdown(head, lines)}\n\n{record['machine']}."


if __name__ == "__main__":
    app.run(main)
