"""What one processor core prepares: local, by a shard, on Beam and on Ray, beside datatrove's tokenisation.

    python -m benchmarks.engines --config=base --config.data.source='text:wiki.txt.gz' \
        --config.tokenizer.vocab_size=8192 --json=engines.json > engines.md

All read the same file of JSON lines, with a tokenizer that is made beforehand, and take turns, bound to one core.
`prepare` also packs, writes checksums and counts words; datatrove writes tokens. The time by the clock depends on who
else uses the core; processor seconds, those of all processes that were started, depend on it less. The environments of
Beam, Ray and datatrove come from benchmarks/setup.sh. Linux only.
"""

import contextlib
import ctypes
import itertools
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import NamedTuple

from absl import flags

from benchmarks import turns  # first, for the environment as it was
from flax_mlm.cli import app, tables
from flax_mlm.config.schema import Config
from flax_mlm.errors import Failure
from flax_mlm.storage import files

_ROUNDS = flags.DEFINE_integer("rounds", 3, "of each kind", lower_bound=1)
_JSON = flags.DEFINE_string("json", "", "file for all that was measured")

_SUBREAPER = 36  # PR_SET_CHILD_SUBREAPER: processes that lose their parent become children of this one
_PERIOD = 0.1  # seconds between two looks at the processes
_PEERS = {"Beam": "beam", "Ray": "ray", "datatrove": "datatrove"}


class Seconds(NamedTuple):
    """What a command took: by the clock, and of processors."""

    clock: float
    processor: float


def measure(line: list[str]) -> Seconds:
    """Runs a command to its end, and that of all that it has started. Raises Failure."""
    start, used = time.perf_counter(), dict[int, float]()
    with tempfile.TemporaryFile() as errors:
        env = {**turns.ENVIRONMENT, "PYTHONPATH": str(turns.ROOT)}
        command = subprocess.Popen(line, cwd=turns.ROOT, env=env, stdout=subprocess.DEVNULL, stderr=errors)
        while command.poll() is None:
            used |= _descendants()
            time.sleep(_PERIOD)
        clock = time.perf_counter() - start
        errors.seek(0)
        if command.returncode:
            raise Failure(f"{' '.join(line)} ended with {command.returncode}: {errors.read().decode().strip()[-300:]}")
    while children := _descendants():  # engines leave processes behind that end a little later
        used |= children
        with contextlib.suppress(ChildProcessError):
            os.waitpid(-1, os.WNOHANG)
        time.sleep(_PERIOD)
    return Seconds(clock, sum(used.values()))


def _descendants() -> dict[int, float]:
    """The processor seconds of each process below this one, without its children's. Those of Ray are not counted for
    their parent when they end, so that all are looked at while they run."""
    parents, used = {}, {}
    for file in Path("/proc").glob("[0-9]*/stat"):
        with contextlib.suppress(OSError):
            fields = file.read_text().rpartition(")")[2].split()
            pid = int(file.parent.name)
            parents[pid], used[pid] = int(fields[1]), (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")
    below = {os.getpid()}
    while new := {pid for pid, parent in parents.items() if parent in below} - below:
        below |= new
    return {pid: used[pid] for pid in below - {os.getpid()}}


def write_inputs(config: Config, folder: Path) -> int:
    """Writes the text as JSON lines, and a tokenizer as both libraries read it. Returns the bytes of text."""
    from flax_mlm.data.prepare import source_of
    from flax_mlm.data.tokenizer_training import thinned, train_tokenizer
    from flax_mlm.hf import tokenizer_json

    documents = []
    for _, chunks in itertools.groupby(source_of(config).chunks(), lambda chunk: chunk[:2]):
        documents.append("".join(chunk.text for chunk in chunks))
    with (folder / "text.jsonl").open("w") as file:
        file.writelines(json.dumps({"text": text}) + "\n" for text in documents)
    tokenizer = train_tokenizer(thinned(iter(documents), config.tokenizer.sample_bytes), config.tokenizer)
    tokenizer.save(folder)
    (folder / "json").mkdir()
    (folder / "json" / "tokenizer.json").write_bytes(tokenizer_json.content(tokenizer, 0))
    return sum(len(text.encode()) for text in documents)


def command_lines(config: Config, folder: Path, output: Path) -> dict[str, list[str]]:
    """The command of each kind, which writes to `output`."""
    text, d = folder / "text.jsonl", config.data
    prepare = ["-m", "flax_mlm.prepare", "--config=base", f"--output={output}", f"--config.data.source=jsonl:{text}"]
    prepare += [f"--config.data.seq_len={d.seq_len}", f"--config.model.max_positions={max(512, d.seq_len)}"]
    prepare += ["--config.data.num_workers=1"]
    given = [*prepare, f"--config.tokenizer.path={folder / 'tokenizer.model'}"]
    same = folder / "json" / "tokenizer.json"
    lines = {
        "local": [sys.executable, *given],
        "a shard": [sys.executable, *given, "--shard=1/1"],
        "Beam": [turns.python_of("beam"), *given, "--engine=beam", "--", "--direct_num_workers=1"],
        "Ray": [turns.python_of("ray"), *given, "--engine=ray", "--", "--num_cpus=1"],
        "local, tokenizer.json": [sys.executable, *prepare, f"--config.tokenizer.path={same}"],
    }
    module = str(turns.ROOT / "benchmarks" / "workers" / "datatrove_tokens.py")
    lines["datatrove"] = [turns.python_of("datatrove"), module, *map(str, (text, same, output))]
    return {kind: line for kind, line in lines.items() if kind not in _PEERS or Path(line[0]).exists()}


def main(config: Config) -> None:
    os.sched_setaffinity(0, {min(os.sched_getaffinity(0))})
    ctypes.CDLL(None).prctl(_SUBREAPER, 1, 0, 0, 0)
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        megabytes = write_inputs(config, folder) / 1e6
        kinds = command_lines(config, folder, folder / "output")
        seconds: dict[str, list[Seconds]] = {kind: [] for kind in kinds}
        for number in range(_ROUNDS.value):
            for kind in list(kinds) if number % 2 == 0 else reversed(list(kinds)):
                line = command_lines(config, folder, folder / f"{number}-{len(seconds[kind])}-{kind}".replace(" ", "-"))
                seconds[kind].append(measure(line[kind]))
                turns.say(f"  {kind}: {seconds[kind][-1]}")
    table = []
    for kind, each in seconds.items():
        clock, processor = (statistics.median(values) for values in zip(*each, strict=True))
        rates = (f"{megabytes / s:.2f}" for s in (clock, processor))
        table.append([kind, f"{clock:.1f}", f"{processor:.1f}", *rates])
    print(tables.markdown(("whole command", "s", "processor s", "MB/s", "MB a processor second"), table))
    missing = [kind for kind in _PEERS if kind not in kinds]
    print(f"\n{megabytes:.1f} MB of text, {config.data.source}, tokenizer given; medians of {_ROUNDS.value} turns.")
    if missing:
        print(f"Not there: {', '.join(missing)}; run `bash benchmarks/setup.sh`.")
    print(f"All on one core of: {turns.machine()}.")
    if _JSON.value:
        files.write_json(Path(_JSON.value), {"machine": turns.machine(), "megabytes": megabytes, "seconds": seconds})


if __name__ == "__main__":
    app.run(main)
