"""Compiles models for TPUs that are not here: what fits, and how many bytes move from 8 chips to 256.

    python benchmarks/tpu_plan.py fits OUTPUT.jsonl        # two to three hours on two cores
    python benchmarks/tpu_plan.py scaling OUTPUT.jsonl
    python benchmarks/tpu_plan.py table OUTPUT.jsonl       # writes both tables into docs/results/tpu-plans.md

Run from the repository, with launch/tpu-requirements.txt installed. What is in the file already is not done again.
"""

import importlib
import json
import sys
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parent.parent))

from benchmarks.results import PAGES, dated, replaced
from flax_mlm.cli import tables
from flax_mlm.config.load import build
from flax_mlm.config.schema import Config
from flax_mlm.distributed import chips
from flax_mlm.errors import Failure
from flax_mlm.planning import roofline
from flax_mlm.planning.compile import CompiledStep, Target, compile_step_for, parse_target

MODELS = {
    "BERT-base, 128": ("bert_base", {}),
    "BERT-base, 512": ("bert_base", {"data.seq_len": 512}),
    "BERT-large, 128": ("bert_large", {}),
    "BERT-large, 512": ("bert_large", {"data.seq_len": 512}),
    "ModernBERT-base, 1,024": ("modernbert_base", {}),
    "ModernBERT-base, 8,192": ("modernbert_base", {"data.seq_len": 8192, "train.global_batch_size": 512}),
    "ModernBERT-large, 1,024": ("modernbert_large", {"train.global_batch_size": 4608}),
}
TARGETS = [("v5e:1x1", 1), ("v5e:16x16", 1), ("v5e:4x4", 2), ("v6e:16x16", 1), ("v5p:4x4x4", 1), ("tpu7x:2x2x2", 1)]
SCALES = [*((f"v5e:{shape}", 1) for shape in ("2x4", "4x4", "4x8", "8x8", "8x16", "16x16")), ("v5e:4x4", 2)]
SCALES += [("v5e:4x4", 16)]


def of(name: str, changes: dict[str, Any]) -> Config:
    values = importlib.import_module(f"flax_mlm.configs.{name}").get_config()
    values.update_from_flattened_dict(changes)
    return build(values)


def record(file: Path, key: list[Any], found: CompiledStep, planned: Config) -> None:
    chip = chips.of_kind(found.device_kind)
    assert chip
    roof = roofline.estimate(found, planned, chip)
    used = found.total_bytes / (chip.memory * found.chips / found.devices)
    sums = {"links": 0.0, "network": 0.0}
    for one in found.collectives:
        sums["network" if one["axes"] == ["slices"] else "links"] += one["sent"]
    line = {
        "key": key, "mesh": list(found.mesh.values()), "remat": planned.model.remat, "attention": found.attention,
        "rows": planned.train.global_batch_size // (found.mesh["data"] * found.mesh["fsdp"]),
        "microbatches": planned.train.gradient_accumulation_steps, "bytes": found.total_bytes, "used": used,
        "sent": sums,
        "best": roof.best, "worst": roof.worst, "roof": roof._asdict(),
        "mfu": [roofline.mfu(found, chip, s) for s in (roof.worst, roof.best)], "seconds": found.compile_seconds,
        "matmuls": found.matmul_ratio, "traffic": found.traffic,
        "fusions": found.fusions, "copies": found.copies,
    }  # fmt: skip
    with file.open("a") as f:
        f.write(json.dumps(line) + "\n")
    print(json.dumps(line), flush=True)


def fewest_parts(name: str, changes: dict[str, Any], target: Target) -> tuple[CompiledStep, Config]:
    """The model in the fewest microbatches that fit the target, and its config; layers recomputed as that says."""
    planned = of(name, changes)
    mesh = compile_step_for(planned, planned.tokenizer.vocab_size, target, compiles=False).mesh
    rows = planned.train.global_batch_size // (mesh["data"] * mesh["fsdp"])
    for parts in (p for p in range(1, rows + 1) if rows % p == 0):
        planned = of(name, changes | {"train.gradient_accumulation_steps": parts})
        traced = compile_step_for(planned, planned.tokenizer.vocab_size, target, compiles=False)
        chip = chips.of_kind(traced.device_kind)
        assert chip
        if traced.least_bytes > 1.1 * chip.memory * traced.chips / traced.devices:
            continue  # the compiler does with less, but not by so much
        found = compile_step_for(planned, planned.tokenizer.vocab_size, target)
        print(name, target, parts, found.error[:200] or "fits", flush=True)
        if not found.error:
            return found, planned
    raise Failure(f"{name} does not fit {target}, row by row")


def compile_all(file: Path, done: list[Any]) -> None:
    """Every model on every target."""
    for model, (name, changes) in MODELS.items():
        for topology, slices in TARGETS:
            if [model, topology, slices] not in done:
                fsdp = 4 if "large" in name and topology != "v5e:1x1" else 1
                target = parse_target(topology, slices)
                record(file, [model, topology, slices], *fewest_parts(name, changes | {"mesh.fsdp": fsdp}, target))


def scaling(file: Path, done: list[Any]) -> None:
    """BERT-base with 64 rows of 128 a chip, whatever the number of chips."""
    for fsdp in (1, 4):
        for topology, slices in SCALES:
            key = ["scaling", fsdp, topology, slices]
            if key in done:
                continue
            target = parse_target(topology, slices)
            number = slices
            for side in target.shape.split("x"):
                number *= int(side)
            planned = of("bert_base", {"train.global_batch_size": 64 * number, "mesh.fsdp": fsdp})
            found = compile_step_for(planned, planned.tokenizer.vocab_size, target)
            record(file, key, found, planned)


def table(lines: list[dict[str, Any]]) -> str:
    """Returns both tables, Markdown."""
    plans, scales = [], []
    for m in lines:
        *_, topology, slices = m["key"]
        where = topology + (f" × {slices}" if slices > 1 else "")
        bounds = f"{1e3 * m['best']:,.0f} to {1e3 * m['worst']:,.0f} ms"
        if m["key"][0] == "scaling":
            sent = [f"{m['sent'][network] / 1e6:,.0f}" for network in ("links", "network")]
            taken = [f"{1e3 * m['roof'][network]:.1f}" for network in ("links", "network")]
            scales.append([str(m["key"][1]), where, *sent, *taken, bounds])
            continue
        plans.append(
            [
                m["key"][0],
                where,
                f"{m['mesh'][0]} × {m['mesh'][1]}",
                f"{m['rows']:,} / {m['microbatches']}",
                f"{m['attention']}, {m['remat']}",
                f"{m['bytes'] / 2**30:.1f} ({m['used']:.0%})",
                bounds,
                f"{m['mfu'][0]:.0%} to {m['mfu'][1]:.0%}",
                f"{m['matmuls']:.2f}",
                f"{m['traffic'] / 1e9:,.1f}",
                f"{m['fusions']:,}, {m['copies']:,}",
            ]
        )
    head = ("model, tokens per row", "target", "data × fsdp", "rows / microbatches", "attention, remat", "GiB")
    columns = (*head, "step time", "MFU", "matmuls", "GB", "fusions, copies")
    scale = ("fsdp", "chips", "MB on links", "MB between slices", "ms on links", "ms between slices", "step time")
    return dated(
        "### Fit and step time",
        tables.markdown(columns, plans, text_columns=5),
        "### Weak scaling",
        "BERT-base, 64 rows of 128 tokens on each v5e chip: what each chip sends in a step.",
        tables.markdown(scale, scales, text_columns=2),
    )


if __name__ == "__main__":
    what, path = sys.argv[1], Path(sys.argv[2])
    lines = [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []
    keys = [line["key"] for line in lines]
    if what == "table":
        page = PAGES / "tpu-plans.md"
        page.write_text(replaced(page.read_text(), "plans", table(lines)))
    else:
        {"fits": compile_all, "scaling": scaling}[what](path, keys)
