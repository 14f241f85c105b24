"""ONNX files of an exported Hugging Face folder: written through transformers, compared, measured, or refused.

What a network computes follows from the folder alone: vectors' hidden states where it is one of sentence-transformers,
otherwise the logits of the class that its config.json names. torch, transformers, onnx and onnxruntime are optional.
"""

import contextlib
import functools
import importlib.metadata
import importlib.util
import io
import json
import logging
import os
import statistics
import time
import warnings
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from flax_mlm.data.sources.open import open_source
from flax_mlm.errors import Failure, UserError, as_user_error
from flax_mlm.hf import sentence_transformers
from flax_mlm.hf.folder import read_json

MODEL, QUANTIZED = "onnx/model.onnx", "onnx/model_quantized.onnx"  # as optimum and transformers.js look for them
REPORT = "onnx/measurements.json"
LIMIT = 1e-4  # largest difference of an output in float32
_PACKAGES = ("torch", "transformers", "onnx", "onnxscript", "onnxruntime")
_INPUTS = ("input_ids", "attention_mask", "token_type_ids")
_NUM_TEXTS, _LINES_READ = 64, 4096
_BATCH_TOKENS = 1024  # of a batch: logits over 50,000 tokens take 200 MiB
_ONE_FILE = 2**31  # bytes that a protobuf file may have
_TIMED_TOKENS, _ROUNDS = 128, 15
_FEWEST, _SECONDS = 3, 60  # rounds that are timed even where they take longer than these seconds

Outputs = Callable[[Sequence[list[int]]], Iterator[tuple[int, np.ndarray]]]  # rows of token ids -> see `Network`


class Drop(NamedTuple):
    """Loss of a network on the checkpoint's own task, against the checkpoint's model in float32."""

    metric: str
    reference: float  # of the checkpoint's model
    value: float  # of the network
    drop: float  # positive where the network is worse
    stderr: float  # of the drop, from differences of the same examples
    examples: str  # what it was measured on

    @property
    def interval(self) -> tuple[float, float]:
        """Bounds of the drop, 95%."""
        return self.drop - 1.96 * self.stderr, self.drop + 1.96 * self.stderr


Task = Callable[[Outputs], Drop]


def require_packages() -> None:
    """Raises UserError unless the optional packages are installed."""
    if missing := [package for package in _PACKAGES if not importlib.util.find_spec(package)]:
        install = "pip install -r launch/onnx-requirements.txt"
        raise UserError(f"--onnx needs {', '.join(missing)}; {install}, or pip install {' '.join(_PACKAGES)}")


def sample_texts(source: str, count: int = _NUM_TEXTS) -> list[str]:
    """Returns lines of the beginning of a source, from all over it.

    Raises:
      UserError: the source cannot be read, or has no text.
    """
    lines: list[str] = []
    for chunk in open_source(source).chunks():
        lines += [line for line in chunk.text.split("\n") if line.strip()]
        if len(lines) >= _LINES_READ:
            break
    if not lines:
        raise UserError(f"data.source is '{source}', which has no text; name another for the checks of --onnx")
    return lines[:: max(1, len(lines) // count)][:count]


class Network:
    """An ONNX file, opened by onnxruntime alone."""

    def __init__(self, file: Path, pad_id: int, threads: int = 0):
        """Opens a file.

        Args:
          pad_id: the token that fills up rows.
          threads: at most so many compute; 0: one for each core.
        """
        import onnxruntime

        options = onnxruntime.SessionOptions()
        options.intra_op_num_threads, options.inter_op_num_threads = threads, 1
        options.log_severity_level = 3  # errors
        options.add_session_config_entry("session.intra_op.allow_spinning", "0")  # which would slow what is timed next
        self._session = onnxruntime.InferenceSession(str(file), options, providers=["CPUExecutionProvider"])
        self._names = [one.name for one in self._session.get_inputs()]
        self._pad_id = pad_id

    def run(self, tokens_BL: np.ndarray, mask_BL: np.ndarray, types_BL: np.ndarray | None = None) -> np.ndarray:
        """Computes a batch: tokens, whether each is none of padding, and token types, int64 (B, L)."""
        types_BL = np.zeros_like(tokens_BL) if types_BL is None else types_BL
        inputs = dict(zip(_INPUTS, (tokens_BL, mask_BL, types_BL), strict=True))
        return self._session.run(None, {name: inputs[name] for name in self._names})[0]

    def outputs(
        self, rows: Sequence[list[int]], types: Sequence[list[int]] | None = None
    ) -> Iterator[tuple[int, np.ndarray]]:
        """Computes rows in batches of similar length, the shortest first.

        Args:
          rows: token ids, special ones included.
          types: token types of each row; None: all are 0.

        Yields:
          for each row its index, and float32 (L, C), or (C,) where the network computes something for a whole row.
        """
        for indices in _batches(rows):
            filled_BL, mask_BL = _padded([rows[i] for i in indices], self._pad_id)
            types_BL = None if types is None else _padded([types[i] for i in indices], 0)[0]
            for i, output in zip(indices, self.run(filled_BL, mask_BL, types_BL), strict=True):
                yield i, output if output.ndim == 1 else output[: len(rows[i])]


def _batches(rows: Sequence[list[int]]) -> Iterator[list[int]]:
    batch: list[int] = []
    for i in sorted(range(len(rows)), key=lambda i: len(rows[i])):
        if batch and (len(batch) + 1) * len(rows[i]) > _BATCH_TOKENS:
            yield batch
            batch = []
        batch.append(i)
    if batch:
        yield batch


def _padded(rows: Sequence[list[int]], value: int) -> tuple[np.ndarray, np.ndarray]:
    """Pads rows, int64 (B, L); also whether each value is one of a row."""
    lengths_B1 = np.array([[len(row)] for row in rows])
    mask_BL = (np.arange(lengths_B1.max())[None] < lengths_B1).astype(np.int64)
    filled_BL = np.full(mask_BL.shape, value, np.int64)
    filled_BL[mask_BL > 0] = np.concatenate([np.asarray(row, np.int64) for row in rows])
    return filled_BL, mask_BL


def write(
    folder: Path, rows: Sequence[list[int]], pad_id: int, task: Task, int8: bool, max_drop: float
) -> dict[str, Any]:
    """Writes the ONNX files of a folder and their measurements into it.

    The caller removes the folder where this raises, so that no refused file stays.

    Args:
      folder: as `export` writes it.
      rows: token ids of real text, special ones included, to compare with transformers.
      pad_id: the token that fills up rows.
      task: measures what a network loses on the checkpoint's own task.
      int8: also write a file whose weights are int8, quantized dynamically.
      max_drop: the largest drop at the upper end of its interval.

    Returns:
      what is in the file of measurements.

    Raises:
      UserError: the weights are too large for one file.
      Failure: a network computes something else than transformers, or loses more than `max_drop`.
    """
    net, output = _torch_network(folder)
    size = 4 * sum(parameter.numel() for parameter in net.parameters())
    if size > 0.95 * _ONE_FILE:
        raise UserError(f"--onnx: the weights have {size / 2**30:.1f} GiB; expected less than 2 GiB, as ONNX needs")
    (folder / MODEL).parent.mkdir()
    with _quiet():
        _write_model(net, output, rows, folder / MODEL)
        if int8:
            _write_quantized(folder / MODEL, folder / QUANTIZED)
    files = {"float32": MODEL, **({"int8": QUANTIZED} if int8 else {})}
    report: dict[str, Any] = {"versions": _versions(), "max_drop": max_drop, "files": {}}
    for name, file in files.items():
        network = Network(folder / file, pad_id)
        difference, drop = _difference(network, net, output, rows), task(network.outputs)
        report["files"][name] = {
            **{"file": file, "bytes": (folder / file).stat().st_size, "largest_difference": difference},
            "task": {**drop._asdict(), "interval": drop.interval},
        }
        _refuse(name, difference, drop, max_drop)
    report["latency"] = _latencies({name: folder / file for name, file in files.items()}, net, rows, pad_id)
    (folder / REPORT).write_text(f"{json.dumps(report, indent=2)}\n")
    return report


def _refuse(name: str, difference: float, drop: Drop, max_drop: float) -> None:
    low, high = drop.interval
    if name == "float32" and not difference <= LIMIT:  # also where it is NaN
        raise Failure(f"--onnx: the network differs from transformers by {difference:.1e}; expected at most {LIMIT:g}")
    if not high <= max_drop:
        what = f"--max_drop is {max_drop:g}, but {name} loses {drop.drop:.4f} ({low:.4f} to {high:.4f})"
        remedy = "leave out --int8" if name == "int8" else "raise --max_drop"
        raise Failure(f"{what} in {drop.metric} over {drop.examples}; nothing is written; {remedy}")


def lines(report: dict[str, Any]) -> list[str]:
    """Formats measurements for a person."""
    result = []
    for name, one in report["files"].items():
        drop, (low, high) = one["task"], one["task"]["interval"]
        result += [
            f"{name:8} {one['file']}, {one['bytes'] / 2**20:,.1f} MiB; largest difference to transformers "
            f"{one['largest_difference']:.1e}",
            f"{'':8} {drop['metric']} {drop['value']:.4f}, of the checkpoint {drop['reference']:.4f}; loses "
            f"{drop['drop']:.5f} ({low:.5f} to {high:.5f}, 95%) over {drop['examples']}",
        ]
    timing = report["latency"]
    result.append(f"latency  of one row of {timing['tokens']} tokens, median of {timing['rounds']}, in turns:")
    for threads, times in timing["milliseconds"].items():
        each = ", ".join(f"{name} {value:.1f} ms" for name, value in times.items())
        result.append(f"{'':8} {threads} core{'s' * (threads != '1')}: {each}")
    if timing["load"] > timing["cores"] + 1:  # its own is about 1
        what = f"a load of {timing['load']:.0f} on {timing['cores']} cores"
        result.append(f"WARNING: other programs have slowed what was timed ({what}); repeat it on an idle machine")
    return result


def _torch_network(folder: Path) -> tuple[Any, str]:
    """Returns the folder's model in torch, float32, with the name of the output that is wanted."""
    import torch
    import transformers

    transformers.utils.logging.disable_progress_bar()
    transformers.utils.logging.set_verbosity_error()  # that a pooler is missing, which is not written
    if sentence_transformers.is_sentence_encoder(folder):
        kind, output = transformers.AutoModel, "last_hidden_state"
    else:
        (name,) = read_json(folder / "config.json")["architectures"]
        kind, output = getattr(transformers, name), "logits"
    return kind.from_pretrained(folder, dtype=torch.float32, attn_implementation="eager").eval(), output


def _torch_inputs(net: Any, rows: Sequence[list[int]]) -> dict[str, Any]:
    """Returns the inputs that a module takes, of rows of any lengths."""
    import torch

    tokens_BL, mask_BL = _padded(rows, net.config.pad_token_id or 0)
    inputs = dict(zip(_INPUTS, (tokens_BL, mask_BL, np.zeros_like(tokens_BL)), strict=True))
    if not getattr(net.config, "type_vocab_size", 0):
        del inputs["token_type_ids"]
    return {name: torch.from_numpy(array) for name, array in inputs.items()}


def _write_model(net: Any, output: str, rows: Sequence[list[int]], file: Path) -> None:
    """Writes a network that takes any batch and any length, and computes `output` only."""
    import onnx_ir
    from onnx_ir.passes.common import RemoveUnusedNodesPass

    with as_user_error("--onnx needs a newer transformers, pip install -U transformers: ", ImportError):
        from transformers.exporters.exporter_onnx import OnnxConfig, OnnxExporter
    inputs = _torch_inputs(net, sorted(rows, key=len)[-2:])
    program = OnnxExporter().export(net, inputs, config=OnnxConfig(dynamic=True)).program
    (wanted,) = (value for value in program.graph.outputs if value.name == output)
    program.graph.outputs[:] = [wanted]  # a pooler's weights are those of nobody
    RemoveUnusedNodesPass()(program)
    onnx_ir.save(program, file)


def _write_quantized(source: Path, target: Path) -> None:
    """Writes a network whose matrices are int8, and whose activations are quantized as they come."""
    from onnxruntime.quantization import QuantType, quantize_dynamic

    quantize_dynamic(source, target, weight_type=QuantType.QInt8, per_channel=True)


def _difference(network: Network, net: Any, output: str, rows: Sequence[list[int]]) -> float:
    """Returns the largest difference of an output between a network and a torch module, at tokens of rows."""
    import torch

    largest = 0.0
    for i, found in network.outputs(rows):
        with torch.no_grad():
            expected = getattr(net(**_torch_inputs(net, [rows[i]])), output)[0].numpy()
        largest = float(np.maximum(largest, np.abs(found - expected).max()))  # unlike max, keeps NaN
    return largest


def _latencies(files: dict[str, Path], net: Any, rows: Sequence[list[int]], pad_id: int) -> dict[str, Any]:
    """Measures one row at a time, of the longest row's first tokens, on one and two cores; all take turns."""
    import torch

    row, load = max(rows, key=len)[:_TIMED_TOKENS], os.getloadavg()[0]
    inputs = _torch_inputs(net, [row])
    arrays = [inputs[name].numpy() for name in _INPUTS[:2]]

    def call_torch(threads: int) -> None:
        torch.set_num_threads(threads)
        with torch.no_grad():
            net(**inputs)

    calls: dict[tuple[str, str], Callable[[], Any]] = {}
    for threads in (1, 2):
        for name, file in files.items():
            calls[str(threads), name] = functools.partial(Network(file, pad_id, threads).run, *arrays)
        calls[str(threads), "transformers"] = functools.partial(call_torch, threads)
    times: dict[tuple[str, str], list[float]] = {key: [] for key in calls}
    end = time.monotonic() + _SECONDS
    for number in range(1 + _ROUNDS):
        if number > _FEWEST and time.monotonic() > end:
            break
        for key, call in calls.items():
            begin = time.perf_counter()
            call()
            times[key].append(time.perf_counter() - begin)
    medians: dict[str, dict[str, float]] = {"1": {}, "2": {}}
    for (cores, name), values in times.items():
        medians[cores][name] = 1000 * statistics.median(values[1:])  # the first one warms up
    machine = {"cores": len(os.sched_getaffinity(0)), "load": load}
    return {"tokens": len(row), "rounds": len(values) - 1, **machine, "milliseconds": medians}


def _versions() -> dict[str, str]:
    return {name: importlib.metadata.version(name) for name in _PACKAGES}


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Silences what the exporters log and print about their own progress."""
    level = logging.root.manager.disable
    logging.disable(logging.WARNING)
    try:
        with warnings.catch_warnings(action="ignore"), contextlib.redirect_stdout(io.StringIO()):
            yield
    finally:
        logging.disable(level)
