"""Our train step against those that a user would otherwise run, side by side on this machine.

    bash benchmarks/setup.sh
    python -m benchmarks.train_step --rounds=7 --json=train_step.json \
        --config.data.source='text:wiki.txt.gz' > train_step.md

Every program runs in a process and an environment of its own and takes turns with the others (benchmarks/turns.py). All
start from the same weights, exported by us, on the same rows of real text without padding, with the same 15% of the
tokens hidden, in float32 without dropout, with AdamW and clipped gradients; a program whose losses are not ours is not
reported. Ours hides the tokens itself, inside the step; the others find it done. What is in the JSON file already is
not measured again.
"""

import json
import tempfile
from pathlib import Path
from typing import Any, NamedTuple

from absl import flags

from benchmarks import case as case_lib
from benchmarks import turns  # first, for the environment as it was
from flax_mlm.cli import app, tables
from flax_mlm.config.schema import Config
from flax_mlm.errors import Failure, UserError
from flax_mlm.storage import files

LIMITS = (1e-4, 1e-3)  # of a loss from ours: at the first step, and of the first four at most


class Program(NamedTuple):
    """What one row of the table runs."""

    module: str  # of benchmarks/workers
    family: str  # whose weights it starts from
    spec: dict[str, Any]
    environment: str = ""  # folder beside the other peers' environments; empty: ours
    variables: dict[str, str] = {}  # noqa: RUF012
    about: str = ""


# What launch/local.sh sets for us. What we set for ourselves: glibc gives freed memory back to the system and takes it
# again in every step, unless it is told to keep it.
_HUGE = "glibc.malloc.hugetlb=1"
_OURS = {**turns.CPU, "GLIBC_TUNABLES": _HUGE}
_KEPT = f"glibc.malloc.mmap_max=0:glibc.malloc.trim_threshold={2**64 - 1}:glibc.malloc.arena_max=1"
_TUNED = {"GLIBC_TUNABLES": f"{_KEPT}:{_HUGE}"}
_TORCH = {"compile": False, "device": "cpu", "autocast": False, "more": {}}
_SPARSE = {**_TORCH, "more": {"sparse_prediction": True}}

PROGRAMS = {
    "ours": Program("ours", "bert", {"scan_layers": False}, "", _OURS, "BERT, layers unrolled"),
    "ours_scan": Program("ours", "bert", {"scan_layers": True}, "", _OURS, "BERT, layers scanned"),
    "bert_eager": Program("torch_step", "bert", _TORCH, "torch", about="BertForMaskedLM, torch"),
    "bert_compiled": Program("torch_step", "bert", {**_TORCH, "compile": True}, "torch", about="it, torch.compile"),
    "flax_bert": Program("flax_step", "bert", {}, "flax", turns.CPU, "FlaxBertForMaskedLM, transformers 4"),
    "ours_modernbert": Program("ours", "modernbert", {"scan_layers": False}, "", _OURS, "ModernBERT"),
    "modernbert_sparse": Program(
        "torch_step", "modernbert", _SPARSE, "torch", about="ModernBertForMaskedLM, torch, sparse_prediction"
    ),
    "modernbert_sparse_tuned": Program(
        "torch_step", "modernbert", _SPARSE, "torch", _TUNED, "the same, its allocator tuned by GLIBC_TUNABLES"
    ),
}  # fmt: skip
# Few enough at a time for 24 GiB at 12×768; `ours` is in each, and ratios are to that one.
GROUPS = {
    "jax": ("ours", "ours_scan", "flax_bert"),
    "torch": ("bert_eager", "bert_compiled"),
    "modernbert": ("ours_modernbert", "modernbert_sparse", "modernbert_sparse_tuned"),
}
_REFERENCE = {"bert": "ours", "modernbert": "ours_modernbert"}  # whose losses the others of a family must have

_PEERS = flags.DEFINE_list("peers", list(PROGRAMS), f"of {', '.join(PROGRAMS)}; ours always runs")
_SIZES = flags.DEFINE_list("sizes", ["4x256", "4x512", "12x768"], "layers x width")
_LENGTHS = flags.DEFINE_list("lengths", ["128", "512"], "tokens of a row")
_VOCABS = flags.DEFINE_list("vocabs", ["8192", "30522"], "sizes of the vocabulary")
_TOKENS = flags.DEFINE_list("tokens", ["4096", "2048", "1024"], "tokens of a batch, for each of --sizes")
_ROUNDS = flags.DEFINE_integer("rounds", 7, "turns of each program", lower_bound=1)
_SECONDS = flags.DEFINE_float("seconds", 4.0, "of a turn, about; at least one step")
_JSON = flags.DEFINE_string("json", "", "file for all that was measured; cases in it are not measured again")


def cases() -> list[case_lib.Case]:
    """What the flags ask for. Raises UserError."""
    try:
        sizes = [tuple(map(int, size.split("x"))) for size in _SIZES.value]
        sized = [(layers, width, int(t)) for (layers, width), t in zip(sizes, _TOKENS.value, strict=True)]
        return [
            case_lib.Case(layers, width, int(length), int(vocab), max(1, tokens // int(length)))
            for layers, width, tokens in sized
            for length in _LENGTHS.value
            for vocab in _VOCABS.value
        ]
    except ValueError as e:
        raise UserError(f"--sizes, --tokens, --lengths or --vocabs: {e}; see --help") from e


def measure(case: case_lib.Case, names: list[str], folder: Path) -> dict[str, Any]:
    """The programs of one group, in turns."""
    matmuls = {"matmuls": case.matmuls(), "device": "cpu", "dtype": "float32", "seconds": 0.1}
    optimizer = case.config("bert").to_dict()["optimizer"]
    with turns.Workers() as workers:
        workers.start("matmul", "matmul", matmuls, "torch")
        for name in names:
            program = PROGRAMS[name]
            spec = {**program.spec, "folder": str(folder / program.family), "optimizer": optimizer}
            workers.start(name, program.module, spec, program.environment, **program.variables)
        workers.take_turns(_ROUNDS.value, _SECONDS.value)
        refused, ready = dict(workers.refused), workers.ready
        for family, reference in _REFERENCE.items():
            alike = [worker for name, worker in ready.items() if name in names and PROGRAMS[name].family == family]
            if alike and reference not in ready:
                raise Failure(f"{case.name}: {refused[reference]}, so there is nothing to compare with")
            if alike:
                refused |= case_lib.compare_losses(alike, ready[reference], LIMITS)
        programs: dict[str, Any] = {name: {"refused": why} for name, why in refused.items() if name != "matmul"}
        for name, worker in ready.items():
            if name != "matmul" and name not in refused:
                reference = ready[_REFERENCE[PROGRAMS[name].family]]
                programs[name] = worker.summary() | {"ratio": worker.median() / reference.median()}
        top = case_lib.ceiling(case.matmuls(), ready["matmul"]) if "matmul" in ready else None
        return {"programs": programs, "ceiling": top, "discarded": workers.discarded}


def groups() -> dict[str, list[str]]:
    """The programs asked for, and ours, by group. Raises UserError."""
    if unknown := set(_PEERS.value) - PROGRAMS.keys():
        raise UserError(f"--peers: there is no '{min(unknown)}'; there are {', '.join(PROGRAMS)}")
    found = {}
    for group, programs in GROUPS.items():
        if asked := [name for name in programs if name in _PEERS.value]:
            references = [_REFERENCE[PROGRAMS[name].family] for name in asked]
            found[group] = list(dict.fromkeys(["ours", *references, *asked]))
    return found


def markdown(measured: list[dict[str, Any]]) -> str:
    """The tables."""
    lines, about = [], {}
    for one in measured:
        case = case_lib.Case(**one["case"])
        rows = []
        shown: set[str] = set()
        for group in one["groups"].values():
            for name, p in group["programs"].items():
                if name in shown:
                    continue  # ours, measured again beside the others; their ratios are to that
                shown.add(name)
                about[name] = PROGRAMS[name].about if name in PROGRAMS else ""
                if "refused" in p:
                    rows.append([name, f"not reported: {p['refused']}", *[""] * 7])
                    continue
                quiet = len(p["turns"]) - p["discarded"]
                rate, top = case.flops() / p["step_seconds"], group["ceiling"]
                rows.append(
                    [
                        name,
                        f"{'' if quiet else '~'}{1e3 * p['step_seconds']:,.0f}",
                        f"{case.rows * case.length / p['step_seconds']:,.0f}",
                        f"{p['ratio']:.2f}",
                        f"{rate / top['best']:.0%}" if top else "",
                        f"{p['peak_bytes'] / 2**30:.2f}",
                        f"{p['build_seconds'] + p['first_step_seconds']:.1f}",
                        f"{p['system_share']:.1%}",
                        f"{quiet} of {len(p['turns'])}",
                    ]
                )
        head = ("program", "ms a step", "tokens/s", "ours is faster, times", "of the ceiling", "peak GiB")
        lines += [
            f"**{case.name}**",
            "",
            tables.markdown((*head, "build and first step, s", "in the kernel", "quiet turns"), rows),
            "",
        ]
        for name, group in one["groups"].items():
            if top := group["ceiling"]:
                lines.append(
                    f"Ceiling (group {name}): {top['best'] / 1e9:.0f} GFLOP/s, by the best of the step's matmuls; "
                    f"{top['mixed'] / 1e9:.0f} by all of them. {group['discarded']}."
                )
        lines.append("")
    lines += [f"- `{name}`: {text}" for name, text in about.items() if text]
    return "\n".join(lines)


def main(config: Config) -> None:
    file = Path(_JSON.value) if _JSON.value else None
    record = json.loads(file.read_text()) if file and file.exists() else {"machine": turns.machine(), "cases": []}
    wanted = groups()
    for case in cases():
        if any(case == case_lib.Case(**one["case"]) for one in record["cases"]):
            continue
        turns.say(case.name)
        one: dict[str, Any] = {"case": vars(case), "source": config.data.source, "groups": {}}
        with tempfile.TemporaryDirectory() as folder:
            tokenizer, rows = case_lib.real_rows(case, config)
            ids = case_lib.Ids.of(tokenizer)
            for group, names in wanted.items():
                for needed in {PROGRAMS[name].family for name in names}:
                    if not (Path(folder) / needed).exists():
                        case.make(Path(folder) / needed, needed, ids, rows)
                one["groups"][group] = measure(case, names, Path(folder))
        record["cases"].append(one)
        if file:
            files.write_json(file, record)
    print(f"{record['machine']}\n\n{markdown(record['cases'])}")
    refused = {
        name
        for one in record["cases"]
        for group in one["groups"].values()
        for name, p in group["programs"].items()
        if "its losses" in p.get("refused", "")
    }
    if refused:
        raise Failure(f"{', '.join(sorted(refused))}: other losses than ours, so not reported")


if __name__ == "__main__":
    app.run(main)
