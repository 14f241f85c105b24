"""Compiles a train step for chips that are not here: does it fit, how fast could it be, what would it cost?

    python -m flax_mlm.plan --config=bert_base --topology=v5e:4x4
    python -m flax_mlm.plan --config=bert_base --topology=v5e:4x4 --slices=2 --token_budget=1e11 --price=1.2
    python -m flax_mlm.plan --config=modernbert_base --topology=v5e:4x4 --sweep

The train step is compiled by the TPU's own compiler (`pip install -r launch/tpu-requirements.txt`). If it does not fit,
the smallest change that fits is searched for. The exit code is 1 if the config as it is does not fit.
"""

import dataclasses
from pathlib import Path
from typing import Any

from absl import flags

from flax_mlm.cli import app
from flax_mlm.config import phases, validate
from flax_mlm.config.schema import Config
from flax_mlm.distributed import chips
from flax_mlm.errors import UserError
from flax_mlm.planning import report, roofline, search
from flax_mlm.planning.compile import CompiledStep, Target, compile_step_for, parse_target
from flax_mlm.storage import files

_TOPOLOGY_HELP = "devices: a TPU slice such as v5e:4x4 or v5p:4x4x4, cpu[:DEVICES], gpu:NAME[:DEVICES]"
_TOPOLOGY = flags.DEFINE_string("topology", "cpu", _TOPOLOGY_HELP)
_SLICES = flags.DEFINE_integer("slices", 1, "number of TPU slices", lower_bound=1)
_TOKEN_BUDGET = flags.DEFINE_float("token_budget", None, "number of tokens to train on; default: the config's", 1.0)
_PRICE = flags.DEFINE_float("price", None, "price per chip-hour, in any currency", lower_bound=0.0)
_SWEEP = flags.DEFINE_bool("sweep", False, "compare meshes, remat and microbatches, and name the fastest")
_MESHES_HELP = "meshes for --sweep: DATAxFSDPxTENSOR, comma-separated; empty: every fsdp that is a power of two"
_MESHES = flags.DEFINE_string("meshes", "", _MESHES_HELP)
_JSON = flags.DEFINE_string("json", "", "file to write the result to")


def main(config: Config) -> int:
    target = parse_target(_TOPOLOGY.value, _SLICES.value)
    if _JSON.value:
        files.check_writable("--json", Path(_JSON.value).expanduser())
    for line in _mixture_lines(config):
        print(line)
    config, note = heaviest_phase(config)
    if note:
        print(note)
    config, vocab_size = adopt_corpus(config)
    code, result = (_sweep if _SWEEP.value else _plan)(config, vocab_size, target)
    if _JSON.value:
        files.write_json(Path(_JSON.value).expanduser(), result)
    return code


def _plan(config: Config, vocab_size: int, target: Target) -> tuple[int, dict[str, Any]]:
    """Prints the plan of a config, and returns exit code and result."""
    step = compile_step_for(config, vocab_size, target)
    chip = chip_of(step, target)
    result = {"target": str(target), **dataclasses.asdict(step)}
    print(*report.model_lines(config, step, target), *report.memory_lines(step, chip), sep="\n")
    if not step.error:
        cost_lines = report.cost_lines(config, step, chip, _TOKEN_BUDGET.value, _PRICE.value)
        print(*report.tiling_lines(config, step, target), *report.program_lines(step), *cost_lines, sep="\n")
        if chip:
            result["roofline"] = roofline.estimate(step, config, chip)._asdict()
        return 0, result
    print(f"\ndoes not fit. The compiler: {step.error}\n")
    change = search.smallest_change(config, vocab_size, target, chip)
    if change:
        print(f"the smallest change that fits: {_overrides(change)}")
    else:
        fields = "train.gradient_accumulation_steps, train.logits_chunks, model.remat and mesh.fsdp"
        print(f"no change of one or two of {fields} fits")
    return 1, result | {"smallest_change": change}


def _sweep(config: Config, vocab_size: int, target: Target) -> tuple[int, dict[str, Any]]:
    """Prints the sweep of a config, and returns exit code and result."""
    first = compile_step_for(config, vocab_size, target, compiles=False)
    chip = chip_of(first, target)
    if not target.is_tpu or chip is None:
        raise UserError(f"--sweep with --topology={_TOPOLOGY.value}; expected a TPU, since only those have estimates")
    print(*report.model_lines(config, first, target), sep="\n")
    meshes = search.parse_meshes(_MESHES.value, config, first.devices, target.slices)
    candidates = search.sweep(config, vocab_size, target, chip, meshes)
    if not candidates:
        print("\nnothing fits")
        return 1, {"best": None, "seconds": {}}
    best = min(candidates, key=lambda candidate: candidate.roof.worst)
    print(f"\nthe fastest without overlap:\n{best.line}\n{_overrides(best.change)}")
    return 0, {"best": best.change, "seconds": {str(c.change): c.roof.worst for c in candidates}}


def _overrides(change: search.Change) -> str:
    return " ".join(f"--config.{name}={value}" for name, value in change.items())


def heaviest_phase(config: Config) -> tuple[Config, str]:
    """Selects the phase with the most tokens at a time, then with the most predictions, as a run of its own.

    Returns:
      its config, and a note for the user where there are several phases.
    """

    def weight(phase: phases.Phase) -> tuple[float, float]:
        t = phase.config.train
        rate = 1.0 if phase.config.objective.name == "clm" else phase.largest_mask_rate
        return t.global_batch_size // t.gradient_accumulation_steps * adopt_corpus(phase.config)[0].data.seq_len, rate

    all_phases = phases.parse_phases(config)
    heaviest = max(all_phases, key=weight)
    ramp = ", ".join(f"{path}->{value}" for path, value in heaviest.final_values.items())
    train = dataclasses.replace(heaviest.config.train, phases=f"0%: {ramp}" if ramp else "")
    note = f"planning the heaviest of {len(all_phases)} phases, which begins at {heaviest.begin:.0%} of the run"
    return dataclasses.replace(heaviest.config, train=train), note if len(all_phases) > 1 else ""


def _mixture_lines(config: Config) -> list[str]:
    """Describes the corpora of each phase, where `data.corpus` names several."""
    from flax_mlm.data import mixture

    if not all(phase.config.data.corpus for phase in phases.parse_phases(config)):
        return []
    mixtures = [mixture.Mixture.open(phase.config.data, print) for phase in phases.parse_phases(config)]
    return list(report.mixture_lines(mixture.phases_of(config, mixtures), mixtures))


def adopt_corpus(config: Config) -> tuple[Config, int]:
    """Returns the config with the row length of its corpora, and the vocabulary size of its corpora or tokenizer."""
    if config.data.corpus:
        from flax_mlm.data.mixture import Mixture

        corpus = Mixture.open(config.data)
        config = dataclasses.replace(config, data=dataclasses.replace(config.data, seq_len=corpus.seq_len))
        validate.check(config)
        return config, corpus.vocab_size
    if config.tokenizer.path:
        from flax_mlm.data.tokenizer import load_tokenizer

        return config, load_tokenizer(config.tokenizer.path, config.tokenizer.extra_tokens_file).vocab_size
    return config, config.tokenizer.vocab_size


def chip_of(step: CompiledStep, target: Target) -> chips.Chip | None:
    """Looks up the target's chip; None for an unknown TPU or a CPU. Raises UserError: an unknown GPU."""
    chip = chips.of_kind(target.gpu or step.device_kind)
    if target.gpu and chip is None:
        known = ", ".join(c.name for c in chips.CHIPS if not c.link)
        raise UserError(f"--topology has GPU '{target.gpu}'; expected one of {known}")
    return chip


if __name__ == "__main__":
    app.run(main)
