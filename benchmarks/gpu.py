"""Our train step against torch's on one GPU, in bfloat16: tokens/s, and the share of what its matmuls can reach.

    bash benchmarks/gpu.sh --json=gpu.json > gpu.md
    bash benchmarks/gpu.sh --smoke               # the same at toy sizes, on any machine

Needs jax with CUDA, torch and transformers in one environment, and no TensorFlow. Rows are made in memory: random
words, or those of a shard of a prepared corpus (--rows). Both start from the same weights and take turns on the card;
torch runs compiled, under autocast, with fused AdamW, and its losses must be ours. No new case is begun after
--minutes, and what is in the JSON file already is not measured again.
"""

import dataclasses
import json
import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np
from absl import flags

from benchmarks import case as case_lib
from benchmarks import turns  # first, for the environment as it was
from flax_mlm.cli import app, tables
from flax_mlm.config.schema import Config
from flax_mlm.storage import files

LIMITS = (2e-2, 5e-2)  # of a loss from ours, both in bfloat16: at the first step, and of the first four at most
SPECIAL = case_lib.Ids(0, [0, 1, 2, 3, 4], pad_id=0, cls_id=2, sep_id=3, mask_id=4)  # as in our own tokenizers

_BERT = {"vocab": 30_522, "vocab_multiple_of": 128, "dtype": "bfloat16"}
_MODERN = {"layers": 22, "width": 768, "inner": 1728, "vocab": 50_368, "dtype": "bfloat16"}  # 1,152 gated
CASES = {
    "BERT-base, 512": ("bert", case_lib.Case(12, 768, 512, rows=64, **_BERT)),
    "BERT-base, 128": ("bert", case_lib.Case(12, 768, 128, rows=256, **_BERT)),
    "ModernBERT-base, 1,024": ("modernbert", case_lib.Case(length=1024, rows=16, **_MODERN)),
    "BERT-large, 512": ("bert", case_lib.Case(24, 1024, 512, rows=32, **_BERT)),
    "BERT-large, 128": ("bert", case_lib.Case(24, 1024, 128, rows=128, **_BERT)),
    "ModernBERT-base, 8,192": ("modernbert", case_lib.Case(length=8192, rows=2, remat="full", **_MODERN)),
}
TOYS = {
    "BERT": ("bert", case_lib.Case(2, 32, 32, 128, 4, "bfloat16")),
    "ModernBERT": ("modernbert", case_lib.Case(2, 32, 32, 128, 4, "bfloat16", "full")),
}

_SMOKE = flags.DEFINE_bool("smoke", False, "toy sizes on the CPU, to see that it runs")
_CASES = flags.DEFINE_list("cases", [], f"numbers of those to measure; empty: all. {dict(enumerate(CASES))}")
_ROUNDS = flags.DEFINE_integer("rounds", 5, "turns of each program", lower_bound=1)
_SECONDS = flags.DEFINE_float("seconds", 1.0, "of a turn, about; at least one step")
_MINUTES = flags.DEFINE_float("minutes", 9.0, "the whole may take; no case begins that would take longer")
_ROWS = flags.DEFINE_string("rows", "", "a shard (.npy) of a prepared corpus, for real words")
_JSON = flags.DEFINE_string("json", "", "file for all that was measured; cases in it are not measured again")


def rows_of(case: case_lib.Case) -> np.ndarray:
    """Rows without padding."""
    shape = (case_lib.BATCHES * case.rows, case.length - 2)
    if _ROWS.value:
        words = np.load(_ROWS.value).reshape(-1)
        words = np.resize(words[(words >= len(SPECIAL.special)) & (words < case.vocab)], shape)
    else:
        words = np.random.default_rng(0).integers(len(SPECIAL.special), case.vocab, shape)
    return np.pad(words, ((0, 0), (1, 1)), constant_values=((0, 0), (SPECIAL.cls_id, SPECIAL.sep_id))).astype(np.int32)


def measure(family: str, case: case_lib.Case, folder: Path) -> dict[str, Any]:
    """Ours and torch's step, in turns."""
    device = "cpu" if _SMOKE.value else "cuda"
    case.make(folder, family, SPECIAL._replace(vocab_size=case.vocab), rows_of(case))
    ours = {"folder": str(folder), "scan_layers": None}
    optimizer = case.config(family).to_dict()["optimizer"]
    torch = {"folder": str(folder), "compile": device == "cuda", "device": device, "autocast": True}
    torch |= {"optimizer": optimizer, "more": {"sparse_prediction": True} if family == "modernbert" else {}}
    side = 128 if _SMOKE.value else 8192
    shapes = [*case.matmuls(), case_lib.Matmul(1, side, side, side, False, 0)]
    matmuls = {"matmuls": shapes, "device": device, "dtype": "bfloat16", "seconds": 0.02}
    platform = {"JAX_PLATFORMS": device, "XLA_PYTHON_CLIENT_PREALLOCATE": "false"}
    with turns.Workers() as workers:
        workers.launch("ours", "ours", ours, **platform)  # all at once: they compile for a minute each
        workers.launch("torch", "torch_step", torch)
        workers.launch("matmul", "matmul", matmuls)
        workers.wait()
        workers.take_turns(_ROUNDS.value, _SECONDS.value)
        ready, refused = workers.ready, dict(workers.refused)
        if "ours" in ready and "torch" in ready:
            refused |= case_lib.compare_losses([ready["torch"]], ready["ours"], LIMITS)
        programs: dict[str, Any] = {name: {"refused": why} for name, why in refused.items() if name != "matmul"}
        programs |= {n: ready[n].summary() for n in ("ours", "torch") if n in ready and n not in refused}
        top = case_lib.ceiling(shapes, ready["matmul"]) if "matmul" in ready else None
        return {"programs": programs, "ceiling": top}


def markdown(record: dict[str, Any]) -> str:
    """The table."""
    rows = []
    for name, one in record["cases"].items():
        case, top = case_lib.Case(**one["case"]), one["ceiling"]
        for program, p in sorted(one["programs"].items()):
            if "refused" in p:
                rows.append([name, program, f"not reported: {p['refused']}", *[""] * 5])
                continue
            rate = case.flops(one["family"]) / p["step_seconds"]
            rows.append(
                [
                    f"{name} × {case.rows}",
                    program,
                    f"{1e3 * p['step_seconds']:,.1f}",
                    f"{case.rows * case.length / p['step_seconds']:,.0f}",
                    f"{rate / 1e12:,.3g}",
                    f"{rate / top['best']:.1%} of {top['best'] / 1e12:,.3g}" if top else "",
                    f"{p['device_peak_bytes'] / 2**30:.1f}",
                    f"{p['build_seconds'] + p['first_step_seconds']:.0f}",
                ]
            )
    head = ("model, tokens a row × rows", "program", "ms a step", "tokens/s", "TFLOP/s", "MFU", "peak GiB", "start, s")
    return f"{record['machine']}\n\n{tables.markdown(head, rows)}"


def device_name() -> str:
    """What the card is called, by torch, in a process of its own lest memory on it be taken."""
    ask = "import torch; print(torch.cuda.get_device_name() if torch.cuda.is_available() else 'no GPU')"
    return subprocess.run([sys.executable, "-c", ask], capture_output=True, text=True).stdout.strip() or "no torch"


def main(_: Config) -> None:
    begun, longest = time.monotonic(), 0.0
    file = Path(_JSON.value) if _JSON.value else None
    record = {"machine": f"{device_name()}, {turns.machine()}", "cases": {}}
    if file and file.exists():
        record = json.loads(file.read_text())
    cases = TOYS if _SMOKE.value else CASES
    wanted = [name for i, name in enumerate(cases) if not _CASES.value or str(i) in _CASES.value]
    for name in wanted:
        start = time.monotonic()
        if name in record["cases"]:
            continue
        if start - begun + longest > 60 * _MINUTES.value:
            turns.say(f"{name}: no time left")
            continue
        turns.say(name)
        family, case = cases[name]
        folder = Path(tempfile.mkdtemp())
        try:
            one = measure(family, case, folder / family)
        finally:
            shutil.rmtree(folder)
        record["cases"][name] = {"family": family, "case": dataclasses.asdict(case), **one}
        if file:
            files.write_json(file, record)
        turns.say(markdown({**record, "cases": {name: record["cases"][name]}}))  # should this be cut off
        longest = max(longest, time.monotonic() - start)
    print(markdown(record))


if __name__ == "__main__":
    app.run(main)
