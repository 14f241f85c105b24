"""Training speed, and the files that metrics are written to: metrics.jsonl, TensorBoard, Weights & Biases."""

import contextlib
import datetime
import hashlib
import io
import json
import math
import re
import threading
import time
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from flax_mlm.config.schema import Config
from flax_mlm.errors import as_user_error
from flax_mlm.storage import files, gcs, mirror
from flax_mlm.storage.retry import retrying

_METRICS = "metrics.jsonl"
# Metrics that a line takes from its step alone; the others are means over the steps since the last line.
_OF_THE_LAST_STEP = {
    *("batch_fingerprint", "learning_rate", "mask_rate", "predicted_tokens", "progress", "skipped"),
    *("skipped_in_a_row", "tokens"),
}


class Throughput:
    """Rates since the last report, and totals over the whole run.

    The clock starts at the end of the first step: what a start takes until then is no training. It stands still in
    pauses, and is read at the end of each step.
    """

    def __init__(self, peak: float | None, before: Mapping[str, float]):
        """Counts from where a run goes on.

        Args:
          peak: peak FLOP/s of all devices; None where unknown.
          before: `totals()` so far; empty for a new run.
        """
        self._peak, self._before = peak, {"tokens_seen": 0, "train_seconds": 0.0, **before}
        self._pauses = 0.0
        self._paused_at: float | None = None
        self._since: float | None = None  # when the rates began
        self._untimed = 0.0  # tokens of the first step
        self._tokens, self._flops, self._waited = 0.0, 0.0, 0.0

    def now(self) -> float:
        """Returns the seconds on a clock that stands still in pauses."""
        return (self._paused_at or time.perf_counter()) - self._pauses

    def add(self, progress: float, tokens: float, flops: float, waited: float, ended: float) -> None:
        """Counts a step.

        Args:
          progress: fraction of the run that is done after it.
          tokens: without padding.
          flops: model FLOPs.
          waited: seconds that it waited for data.
          ended: `now()` at its end.
        """
        self._end = ended
        if self._since is None:
            self._since, self._progress, self._untimed = ended, progress, tokens
            return
        self._tokens += tokens
        self._flops += flops
        self._waited += waited

    @contextlib.contextmanager
    def paused(self) -> Iterator[None]:
        """Excludes the block, which is not training, from all times."""
        self._paused_at = time.perf_counter()
        try:
            yield
        finally:
            self._pauses += time.perf_counter() - self._paused_at
            self._paused_at = None

    def totals(self) -> dict[str, float]:
        """Returns tokens_seen (padding excluded) and train_seconds of the run over all its restarts, without pauses,
        compilation, and steps that a kill has lost. The first step of a start counts as long as the mean of others."""
        tokens, seconds = self._tokens + self._untimed, 0.0
        if self._since is not None and self._tokens:
            seconds = (self._end - self._since) * tokens / self._tokens
        since = {"tokens_seen": int(tokens), "train_seconds": seconds}
        return {name: self._before[name] + value for name, value in since.items()}

    def report(self, progress: float) -> dict[str, float]:
        """Returns tokens_per_second, data_wait (fraction of the time), eta_seconds, mfu (where the peak is known) and
        the totals. The rates of the next report start here. A first step alone has no rates."""
        if self._since is None or not self._tokens:
            return self.totals()
        elapsed, totals = max(self._end - self._since, 1e-9), self.totals()
        remaining = (1.0 - progress) / max(progress - self._progress, 1e-9)
        rates = {"tokens_per_second": self._tokens / elapsed, "data_wait": self._waited / elapsed}
        rates["eta_seconds"] = min(remaining * elapsed, 1e9)
        if self._peak:
            rates["mfu"] = self._flops / elapsed / self._peak
        self._before, self._since, self._progress = totals, self._end, progress
        self._untimed, self._tokens, self._flops, self._waited = 0.0, 0.0, 0.0, 0.0
        return rates | totals


class Means:
    """Means of metrics over the steps since the last report. NaN and infinity, of steps that were skipped, are left
    out.

    Attributes:
      sums: name -> sum and number of the finite values so far.
    """

    def __init__(self, sums: Mapping[str, Sequence[float]]):
        """Goes on from the `sums` of a checkpoint; they are empty for a new run."""
        self.sums = {name: list(pair) for name, pair in sums.items()}

    def add(self, values: Mapping[str, float]) -> None:
        """Counts a step."""
        for name, value in values.items():
            if name not in _OF_THE_LAST_STEP:
                pair = self.sums.setdefault(name, [0.0, 0])
                if math.isfinite(value):
                    pair[:] = pair[0] + value, pair[1] + 1

    def report(self, values: Mapping[str, float]) -> dict[str, float]:
        """Returns the metrics of the last step, with means where they are meant. The next means start here."""
        means = {name: total / count if count else math.nan for name, (total, count) in self.sums.items()}
        self.sums = {}
        return {**values, **means}


Column = tuple[int, str]  # its rank, 0 for what is never left out, and its text


def train_columns(m: dict[str, float]) -> list[Column]:
    """Formats the metrics of a step as the columns of one greppable line."""
    columns = [
        (0, f"loss {m['loss']:.4f}"),
        (4, f"accuracy {m['accuracy']:.4f}"),
        (3, f"lr {m['learning_rate']:.2e}"),
        (6, f"grad_norm {m['grad_norm']:.3f}"),
        *((8, f"{name} {value:.2f}") for name, value in m.items() if name.startswith("epochs/")),
    ]
    if "tokens_per_second" in m:  # the first step of a start has no rates
        mfu = [(5, f"mfu {m['mfu']:.1%}")] if "mfu" in m else []
        speed, waited = (1, f"tokens/s {m['tokens_per_second']:,.0f}"), (7, f"data_wait {m['data_wait']:.1%}")
        columns[4:4] = [speed, *mfu, waited]
        columns.append((2, f"eta {datetime.timedelta(seconds=round(m['eta_seconds']))}"))
    if "generator_loss" in m:
        parts = f"generator {m['generator_loss']:.4f}", f"discriminator {m['discriminator_loss']:.4f}"
        columns[1:1] = [(5, part) for part in parts]
    return columns + ([(0, f"skipped {m['skipped']:.0f}")] if m["skipped"] else [])


def fit(columns: Sequence[Column], width: int | None = None) -> str:
    """Joins columns to a line of at most `width` characters, if that is given, by leaving out those of high rank."""
    kept = list(columns)
    while width and len("  ".join(text for _, text in kept)) > width and (last := max(kept))[0] > 0:
        kept.remove(last)
    return "  ".join(text for _, text in kept)


@retrying
def lines(workdir: Path, kind: str = "") -> list[dict[str, Any]]:
    """Reads the lines of metrics.jsonl in a local workdir: those of one kind (train, validation, cloze), or all. A
    damaged line, or an incomplete one that a kill has left, is skipped."""
    file, entries = workdir / _METRICS, []
    for line in file.read_bytes().split(b"\n") if files.exists(file) else []:
        with contextlib.suppress(ValueError, KeyError, TypeError, RecursionError):
            entry = json.loads(line)
            if entry["step"] >= 0 and kind in ("", entry["kind"]):
                entries.append(entry)
    return entries


def _json_line(entry: Mapping[str, Any]) -> str:
    """Formats a line of metrics.jsonl. NaN and infinity are no JSON: they become null, and `not_finite` names them."""
    words = {name: str(x) for name, x in entry.items() if isinstance(x, float) and not math.isfinite(x)}
    return json.dumps({**entry, **dict.fromkeys(words), **({"not_finite": words} if words else {})}) + "\n"


class Writers:
    """Writes metrics.jsonl, and TensorBoard and Weights & Biases where the config says so. Only process 0 makes one.

    The files of a workdir in a bucket are written to a local folder and copied from there.
    """

    def __init__(self, workdir: gcs.AnyPath, config: Config, start_step: int):
        """Opens the files, and drops the lines of steps after `start_step`: an interrupted run repeats those.

        Raises:
          UserError: metrics.jsonl cannot be written.
        """
        self._mirror = None if isinstance(workdir, Path) else mirror.Mirror(workdir)
        if self._mirror:
            self._mirror.fetch(_METRICS)
        self._folder = self._mirror.folder if self._mirror else Path(workdir)
        self._unwritten = b""
        with as_user_error(f"--workdir: {workdir / _METRICS} cannot be written: ", OSError):
            self._file = self._trimmed(start_step)
        self._tensorboard = self._wandb = None
        self._thread_hook = threading.excepthook
        threading.excepthook = self._report_thread
        if config.log.tensorboard:
            try:
                self._tensorboard = self._open_tensorboard(workdir / "tensorboard", start_step)
            except OSError as e:
                print(f"WARNING: TensorBoard is off: its files cannot be written: {e.strerror}", flush=True)
        if config.log.wandb_project:
            try:
                import wandb

                name, own = workdir.name, hashlib.sha256(str(workdir).encode()).hexdigest()[:8]
                settings = {"name": name, "id": f"{name}-{own}", "resume": "allow", "config": config.to_dict()}
                self._wandb = wandb.init(project=config.log.wandb_project, **settings)
            except Exception as e:  # a missing package, account or network never stops a run
                print(f"Weights & Biases is off: {type(e).__name__}: {e}")

    def _report_thread(self, report: threading.ExceptHookArgs) -> None:
        """Leaves out the thread of tensorboardX, which `_check_tensorboard` reports."""
        if not type(report.thread).__module__.startswith("tensorboardX"):
            self._thread_hook(report)

    def _trimmed(self, start_step: int) -> io.FileIO:
        """Drops the lines of steps after `start_step`, and those that are damaged; opens the file to append to it."""
        file = self._folder / _METRICS
        written = lines(self._folder)
        kept = [m for m in written if m["step"] < start_step or (m["step"], m["kind"]) == (start_step, "train")]
        text = "".join(map(_json_line, kept))
        if file.exists() and file.read_bytes() != text.encode():
            files.write_text(file, text)
        return file.open("ab", buffering=0)

    def _open_tensorboard(self, existing: gcs.AnyPath, start_step: int) -> Any:
        """Opens an event file whose name differs from those of earlier starts and follows them in the alphabet: that is
        the order in which TensorBoard reads, and a later file replaces the steps that it repeats."""
        from tensorboardX import SummaryWriter

        names = [path.name for path in existing.iterdir()] if existing.is_dir() else []
        matches = [match for name in names if (match := re.search(r"tfevents\.(\d+)\..*?(?:\.start(\d+))?$", name))]
        start = 1 + max((int(match[2] or 0) for match in matches), default=0)
        newest = max((int(match[1]) for match in matches), default=0)
        folder = self._folder / "tensorboard"
        # With a bounded queue, writing blocks for ever once the thread that empties it has met a full disk.
        options = {"purge_step": start_step + 1, "max_queue": 0, "filename_suffix": f".start{start}"}
        writer = SummaryWriter(str(folder), **options)
        (file,) = folder.glob(f"*.start{start}")
        if (began := int(file.name.split(".")[3])) <= newest:  # within a second, or the clock has gone back
            file.rename(file.with_name(file.name.replace(f".{began}.", f".{newest + 1}.", 1)))
        return writer

    def flush(self) -> None:
        """Copies the files of a workdir in a bucket there: metrics.jsonl before this returns, the others soon. Called
        before each checkpoint, since a run that continues from it does not repeat those lines."""
        if self._mirror:
            if self._tensorboard:
                with contextlib.suppress(OSError):
                    self._tensorboard.flush()
            self._mirror.copy(_METRICS)
            self._mirror.soon()

    def write(self, step: int, kind: str, values: dict[str, float], text: str = "") -> None:
        """Writes scalars under `kind`: train, validation or cloze. `text`, Markdown, goes to TensorBoard alone."""
        self._unwritten += _json_line({"step": step, "kind": kind, **values}).encode()
        try:
            self._unwritten = self._unwritten[self._file.write(self._unwritten) :]
        except OSError as e:  # a full disk, say; the next line tries again
            print(f"WARNING: metrics.jsonl cannot be written: {e.strerror}", flush=True)
        self._check_tensorboard()
        if self._tensorboard:
            for name, value in values.items():
                self._tensorboard.add_scalar(f"{kind}/{name}", value, step)
            if text:
                self._tensorboard.add_text(kind, text, step)
        if self._wandb:
            try:
                self._wandb.log({f"{kind}/{name}": value for name, value in values.items()}, step=step)
            except Exception as e:
                print(f"Weights & Biases is off: {type(e).__name__}: {e}")
                self._wandb = None

    def _check_tensorboard(self) -> None:
        """Turns TensorBoard off once its writer thread has died: tensorboardX neither reports that nor lets the process
        exit."""
        if self._tensorboard and not (writer := self._tensorboard.file_writer.event_writer)._worker.is_alive():
            print("WARNING: TensorBoard is off: its files cannot be written", flush=True)
            writer._event_queue.cancel_join_thread()
            self._tensorboard = None

    def close(self) -> None:
        """Writes what is buffered, and closes the files."""
        self._file.close()
        self._check_tensorboard()
        if self._tensorboard:
            with contextlib.suppress(OSError):
                self._tensorboard.close()
        if self._mirror:
            self._mirror.close()
        if self._wandb:
            self._wandb.finish()
        threading.excepthook = self._thread_hook
