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
import os
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

from absl import flags

from benchmarks import case as case_lib
from benchmarks import turns  # first, for the environment as it was
from flax_mlm import command, files
from flax_mlm.config import Config
from flax_mlm.errors import Failure, UserError

LIMITS = (1e-4, 1e-3)  # of the difference in loss from ours: at the first step, and of the first four at most


class Program(NamedTuple):
    """What one row of the table runs."""

    module: str  # of benchmarks/workers
    family: str  # whose weights it starts from
    spec: dict[str, Any]
    environment: str = ""  # folder beside the other peers' environments; empty: ours
    variables: dict[str, str] = {}  # noqa: RUF012
    about: str = ""


# glibc gives freed memory back to the system and takes it again in every step; these keep it (as we do for ourselves).
_TUNED = {"GLIBC_TUNABLES": f"glibc.malloc.mmap_max=0:glibc.malloc.trim_threshold={2**64 - 1}:glibc.malloc.arena_max=1"}
_CPU = {"JAX_PLATFORMS": "cpu"}  # else JAX looks for other devices first, for seconds where libtpu is installed
_TORCH = {"compile": False, "device": "cpu", "autocast": False, "more": {}}
_SPARSE = {**_TORCH, "more": {"sparse_prediction": True}}

PROGRAMS = {
    "ours": Program("ours", "bert", {"scan_layers": False}, "", _CPU, "BERT, layers unrolled"),
    "ours_scan": Program("ours", "bert", {"scan_layers": True}, "", _CPU, "BERT, layers scanned"),
    "bert_eager": Program("torch_step", "bert", _TORCH, "torch", about="BertForMaskedLM, torch"),
    "bert_compiled": Program("torch_step", "bert", {**_TORCH, "compile": True}, "torch", about="it, torch.compile"),
    "flax_bert": Program("flax_step", "bert", {}, "flax", _CPU, "FlaxBertForMaskedLM, transformers 4"),
    "ours_modernbert": Program("ours", "modernbert", {"scan_layers": False}, "", _CPU, "ModernBERT"),
    "modernbert_sparse": Program(
        "torch_step", "modernbert", _SPARSE, "torch", about="ModernBertForMaskedLM, torch, sparse_prediction"
    ),
    "modernbert_sparse_tuned": Program(
        "torch_step", "modernbert", _SPARSE, "torch", _TUNED, "the same, its allocator tuned by GLIBC_TUNABLES"
    ),
}  # fmt: skip
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


def python_of(environment: str) -> str:
    """The interpreter of a peer's environment (benchmarks/setup.sh)."""
    folder = Path(os.environ.get("BENCH_VENVS", turns.ROOT / ".venv-bench"))
    return str(folder.absolute() / environment / "bin" / "python") if environment else sys.executable


def write_case(case: case_lib.Case, family: str, folder: Path, ids: case_lib.Ids, rows: Any) -> None:
    """Makes a case's folder, in a process of its own, so that its memory is free again."""
    case.describe(folder, family, ids, rows)
    line = [sys.executable, "-m", "benchmarks.case", str(folder)]
    subprocess.run(line, cwd=turns.ROOT, check=True, env={**os.environ, **_CPU})


def compare_losses(workers: list[turns.Worker], reference: turns.Worker) -> dict[str, str]:
    """Why a program is not reported, by name: its losses are not those of the reference."""
    wrong = {}
    ours = reference.started["first_results"]
    for worker in workers:
        found = worker.started["first_results"]
        differences = [abs(a - b) for a, b in zip(found, ours, strict=True)]
        if not (differences[0] <= LIMITS[0] and max(differences) <= LIMITS[1]):  # also where one is no number
            shown = [" ".join(f"{loss:.5f}" for loss in losses) for losses in (found, ours)]
            wrong[worker.name] = f"its losses are {shown[0]}, those of {reference.name} {shown[1]}"
    return wrong


def ceiling(case: case_lib.Case, worker: turns.Worker) -> dict[str, Any]:
    """What matmuls of the step's shapes reach, FLOP/s: the best of any, and that of all together, each by the faster
    library."""
    matmuls = case.matmuls()
    rates = [result for turn in worker.kept for result in turn.results]
    best = [
        max(statistics.median(rate[library][i] for rate in rates) for library in rates[0]) for i in range(len(matmuls))
    ]
    total = sum(m.flops * m.count for m in matmuls)
    mixed = total / sum(m.flops * m.count / rate for m, rate in zip(matmuls, best, strict=True))
    shapes = [{**m._asdict(), "rate": rate} for m, rate in zip(matmuls, best, strict=True)]
    return {"best": max(best), "mixed": mixed, "shapes": shapes}


def measure(case: case_lib.Case, family: str, names: list[str], folder: Path) -> dict[str, Any]:
    """Ours and the programs of one family, in turns."""
    workers: list[turns.Worker] = []
    programs: dict[str, Any] = {}
    matmuls = {"matmuls": case.matmuls(), "device": "cpu", "dtype": "float32", "seconds": 0.1}
    started = [("matmul", Program("matmul", "", matmuls, "torch")), *((name, PROGRAMS[name]) for name in names)]
    try:
        for name, program in started:
            optimizer = case.config("bert").to_dict()["optimizer"]
            spec = {**program.spec, "folder": str(folder / program.family), "optimizer": optimizer}
            try:
                workers.append(
                    turns.Worker(name, program.module, spec, python_of(program.environment), **program.variables)
                )
                workers[-1].wait()
                turns.say(f"  {name} is ready")
            except turns.Unavailable as e:
                turns.say(f"  left out: {e}")
                programs[name] = {"refused": str(e)}
                if workers and workers[-1].name == name:
                    workers.pop().close()
        turns.take_turns(workers, _ROUNDS.value, _SECONDS.value)
        by_name = {worker.name: worker for worker in workers}
        ours = by_name["ours"]
        for family_name, reference in _REFERENCE.items():
            alike = [by_name[name] for name in names if name in by_name and PROGRAMS[name].family == family_name]
            if alike:
                programs |= {name: {"refused": why} for name, why in compare_losses(alike, by_name[reference]).items()}
        for name, worker in by_name.items():
            if name != "matmul" and name not in programs:
                programs[name] = worker.summary() | {"ratio": worker.median() / ours.median()}
        top = ceiling(case, by_name["matmul"]) if "matmul" in by_name else None
        return {"programs": programs, "ceiling": top, "discarded": turns.discarded(workers)}
    finally:
        for worker in workers:
            worker.close()


def rows_of(case: case_lib.Case, config: Config) -> tuple[case_lib.Ids, Any]:
    """Real text for a case: special ids, and rows without padding."""
    import dataclasses

    from flax_mlm.prepare import prepare_cached

    data = dataclasses.replace(config.data, seq_len=case.length)
    tokenizer = dataclasses.replace(config.tokenizer, vocab_size=case.vocab)
    corpus = prepare_cached(dataclasses.replace(config, data=data, tokenizer=tokenizer), turns.say)
    ids = case_lib.Ids.of(corpus.tokenizer())
    return ids, case_lib.full_rows(corpus.split("train"), case_lib.BATCHES * case.rows, ids)


def groups() -> Iterator[tuple[str, list[str]]]:
    """The programs asked for, by family, ours always among them: few enough at a time for the memory."""
    if unknown := set(_PEERS.value) - PROGRAMS.keys():
        raise UserError(f"--peers: there is no '{min(unknown)}'; there are {', '.join(PROGRAMS)}")
    for family, reference in _REFERENCE.items():
        asked = [name for name in _PEERS.value if PROGRAMS[name].family == family]
        if asked or family == "bert":
            yield family, list(dict.fromkeys(["ours", reference, *asked]))


def markdown(measured: list[dict[str, Any]]) -> str:
    """The tables."""
    lines, about = [], {}
    for one in measured:
        case = case_lib.Case(**one["case"])
        rows = []
        for family, group in one["groups"].items():
            for name, p in group["programs"].items():
                if name == "ours" and family != "bert":
                    continue  # measured again, beside the others; the ratios are to that
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
            turns.table((*head, "build and first step, s", "in the kernel", "quiet turns"), rows),
            "",
        ]
        for family, group in one["groups"].items():
            if top := group["ceiling"]:
                lines.append(
                    f"Ceiling ({family}'s turns): {top['best'] / 1e9:.0f} GFLOP/s, by the best of the step's matmuls; "
                    f"{top['mixed'] / 1e9:.0f} by all of them. {group['discarded'][0].upper()}{group['discarded'][1:]}."
                )
        lines.append("")
    lines += [f"- `{name}`: {text}" for name, text in about.items() if text]
    return "\n".join(lines)


def main(config: Config) -> None:
    file = Path(_JSON.value) if _JSON.value else None
    record = json.loads(file.read_text()) if file and file.exists() else {"machine": turns.machine(), "cases": []}
    wanted = list(groups())
    for case in cases():
        if any(case == case_lib.Case(**one["case"]) for one in record["cases"]):
            continue
        turns.say(case.name)
        one: dict[str, Any] = {"case": vars(case), "source": config.data.source, "groups": {}}
        with tempfile.TemporaryDirectory() as folder:
            ids, rows = rows_of(case, config)
            for family, names in wanted:
                for needed in {PROGRAMS[name].family for name in names}:
                    if not (Path(folder) / needed).exists():
                        write_case(case, needed, Path(folder) / needed, ids, rows)
                one["groups"][family] = measure(case, family, names, Path(folder))
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
    command.run(main)
