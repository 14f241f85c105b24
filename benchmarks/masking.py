"""Our masking against transformers' DataCollatorForLanguageModeling, and as a share of a train step.

    bash benchmarks/setup.sh
    python -m benchmarks.masking --rounds=7 --json=masking.json > masking.md

Ours: exact counts, inside jit, on tokens that are on the device. The collator, as a user has it: from lists of ids; and
its function of tensors alone, to which a tensor and the mask of special tokens are given ready-made. Programs take
turns (benchmarks/turns.py).
"""

import json
import statistics
import tempfile
from pathlib import Path
from typing import Any

from absl import flags

from benchmarks import case as case_lib
from benchmarks import turns  # first, for the environment as it was
from flax_mlm.cli import app, tables
from flax_mlm.config.schema import Config
from flax_mlm.storage import files

_ROUNDS = flags.DEFINE_integer("rounds", 7, "turns of each program", lower_bound=1)
_CALLS = flags.DEFINE_integer("calls", 20, "of each shape in a step of a turn", lower_bound=1)
_SECONDS = flags.DEFINE_float("seconds", 3.0, "of a turn, about; at least one step")
_SHAPES = flags.DEFINE_list("shapes", ["32x128", "8x512", "256x128"], "rows x length; the first also in a train step")
_SIZE = flags.DEFINE_string("size", "4x256", "layers x width of that step's model")
_JSON = flags.DEFINE_string("json", "", "file for all that was measured")


def main(config: Config) -> None:
    shapes = [tuple(map(int, shape.split("x"))) for shape in _SHAPES.value]
    (rows, length), (layers, width) = shapes[0], map(int, _SIZE.value.split("x"))
    case = case_lib.Case(layers, width, length, config.tokenizer.vocab_size, rows)
    # Enough rows for the largest shape; a case takes BATCHES times its own.
    most = max(r * n for r, n in shapes) // length
    plenty = case_lib.Case(layers, width, length, case.vocab, max(rows, -(-most // case_lib.BATCHES)))
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        tokenizer, tokens = case_lib.real_rows(plenty, config)
        ids = case_lib.Ids.of(tokenizer)
        case.make(folder / "bert", "bert", ids, tokens[: case_lib.BATCHES * rows])
        plenty.describe(folder / "masks", "bert", ids, tokens)
        write_tokenizer(folder / "masks" / "hf", tokenizer)
        spec = {"folder": str(folder / "masks"), "shapes": shapes, "calls": _CALLS.value}
        with turns.Workers() as workers:
            workers.start("step", "ours", {"folder": str(folder / "bert"), "scan_layers": False}, **turns.CPU)
            workers.start("ours", "ours_masking", spec, **turns.CPU)
            workers.start("collator", "torch_masking", spec, "torch")
            workers.take_turns(_ROUNDS.value, _SECONDS.value)
            record = report(workers, [f"{r}x{n}" for r, n in shapes])
    if _JSON.value:
        files.write_json(Path(_JSON.value), record)


def write_tokenizer(folder: Path, tokenizer: Any) -> None:
    """Writes a tokenizer as a Hugging Face folder."""
    from flax_mlm.hf import tokenizer_json

    folder.mkdir()
    (folder / "tokenizer.json").write_bytes(tokenizer_json.content(tokenizer, 0))
    (folder / "tokenizer_config.json").write_text(json.dumps(tokenizer_json.settings(tokenizer, 1 << 20, 0)))
    (folder / "special_tokens_map.json").write_text(json.dumps(tokenizer_json.special_tokens(tokenizer)))


def report(workers: turns.Workers, shapes: list[str]) -> dict[str, Any]:
    """Prints the table; returns what it was made of."""

    def seconds(name: str, key: str) -> float | None:
        if name not in workers.ready:
            return None
        return statistics.median(result[key] for turn in workers.ready[name].kept for result in turn.results)

    rows, found = [], {}
    for shape in shapes:
        found[shape] = {name: seconds("collator", f"{shape} {name}") for name in ("lists", "tensor")}
        ours = found[shape]["ours"] = seconds("ours", shape)
        ratios = [
            f"{1e3 * s:.2f} ({s / ours:.1f} times)" if s else "-" for s in map(found[shape].get, ("lists", "tensor"))
        ]
        rows.append([shape.replace("x", "×"), f"{1e3 * ours:.2f}", *ratios])
    step = workers.ready["step"].median()
    share = found[shapes[0]]["ours"] / step
    print(tables.markdown(("ms a batch of rows × length", "ours", "collator, from lists", "torch_mask_tokens"), rows))
    print(f"\nOf a train step of {1e3 * step:,.0f} ms ({_SIZE.value}, {shapes[0]}) ours is {share:.2%}.")
    for why in workers.refused.values():
        print(f"Left out: {why}.")
    print(f"{workers.discarded}; {turns.machine()}.")
    summaries = {name: worker.summary() for name, worker in workers.ready.items()}
    return {"machine": turns.machine(), "seconds": found, "share": share, "programs": summaries}


if __name__ == "__main__":
    app.run(main)
