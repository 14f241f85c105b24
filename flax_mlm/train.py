"""Command: the run, told from top to bottom.

    python -m flax_mlm.train --config=configs/quickstart.py --workdir=runs/quickstart

The same line starts a run, continues one that was killed, and says of a finished one that it is finished.
"""

import contextlib
import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

from absl import flags
from rich.progress import Progress

from flax_mlm.cli import app as command
from flax_mlm.cli import cluster as cluster_flags
from flax_mlm.cli import console
from flax_mlm.config import phases
from flax_mlm.config.load import flatten
from flax_mlm.config.schema import Config
from flax_mlm.distributed import preemption, processes
from flax_mlm.distributed.processes import ClusterConfig
from flax_mlm.errors import PREEMPTED, UserError
from flax_mlm.storage import files, gcs
from flax_mlm.training import run_config
from flax_mlm.training.budget import Budget

_WORKDIR = flags.DEFINE_string(
    "workdir", "", "folder of the run, or gs://BUCKET/FOLDER: checkpoints, metrics.jsonl, config.json"
)

flags.adopt_module_key_flags(cluster_flags)


def train(config: Config, workdir: gcs.AnyPath, cluster: ClusterConfig | None = None) -> int:
    """Trains, saves, evaluates. Returns the exit code."""
    with preemption.Stop() as stop:
        return _train(config, workdir, cluster or ClusterConfig(), stop)


def _train(config: Config, workdir: gcs.AnyPath, cluster: ClusterConfig, stop: preemption.Stop) -> int:
    import jax  # heavy imports wait until flags and config are known to be right

    from flax_mlm.data import mixture
    from flax_mlm.data.open import open_corpora
    from flax_mlm.distributed.mesh import check_batch, make_mesh
    from flax_mlm.storage import lease
    from flax_mlm.training import metrics
    from flax_mlm.training.loop import Run

    identity = {"jax": jax.__version__, **flatten(config.to_dict())}
    with processes.join(cluster, identity, config.train.stall_timeout) as group, contextlib.ExitStack() as at_exit:
        stop.leave = lambda reason: group.leave(PREEMPTED, reason)
        # The devices of all processes, checked before any work is done.
        parts, has_budget = phases.parse_phases(config), config.train.has_budget
        mesh = make_mesh(config.mesh)
        for t in (part.config.train for part in parts):
            check_batch("train.global_batch_size", t.global_batch_size, mesh, t.gradient_accumulation_steps)
        check_batch("eval.batch_size", config.eval.batch_size, mesh)
        if config.train.reproducible:
            check_batch("train.batch_groups", config.train.batch_groups, mesh)
        at_exit.enter_context(jax.set_mesh(mesh))
        at_exit.enter_context(gcs.errors(workdir))
        gcs.check("--workdir", workdir)

        # The folder, to which the first process alone writes, and the text of one corpus or several, as rows of tokens.
        is_main, log = group.index == 0, print if group.index == 0 else lambda *_: None
        held = clock = None
        if is_main:
            run_config.refuse_foreign(workdir)
            held = lease.Lease(workdir, group.run_id)
            at_exit.callback(held.release)
            group.at_leave(held.release)
            held.take(log)
        with group.untimed("opening the corpus"):
            mixtures = open_corpora([part.config for part in parts], log)
        group.check_same("corpus", mixture.fingerprint_of(mixtures))
        group.check_same("--workdir", lease.holder(workdir))
        if is_main:
            run_config.take(workdir, config)
            if has_budget:
                clock = Budget(workdir, 60 * config.train.budget_minutes)
                at_exit.callback(clock.close)
        parts = phases.with_corpora(parts, [c.seq_len for c in mixtures], [c.tokens_per_row for c in mixtures])

        # The model and its optimizer: from the newest sound checkpoint, from a Hugging Face folder, or new.
        run = Run(config, workdir, parts, mixtures, mesh, group, stop, log, held, clock)
        result_file = workdir / "result.json"
        if run.is_over and result_file.exists():
            if is_main:
                print(f"this run is finished: {run.step} steps are done")
                console.summary(workdir, run.trained(), json.loads(result_file.read_text()))
            return 0
        memory = run.compile()
        writers = None
        if is_main:
            result_file.unlink(missing_ok=True)
            console.banner(parts, mixtures, mesh, run.steps_of[0], memory)
            writers = metrics.Writers(workdir, config, run.step)
            at_exit.callback(writers.close)
        run.begin(writers)

        # ORDER MATTERS: dispatch step n, only then read step n - 1, so that the devices never wait for us.
        unread: Callable[[], dict[str, Any]] | None = None
        first = run.step + 1
        progress_bar = at_exit.enter_context(Progress(disable=not (is_main and sys.stdout.isatty())))
        bar = progress_bar.add_task("training", total=1.0)
        stop.hold()
        try:
            if has_budget and not run.is_over:
                run.time_evaluation()
            while not run.is_over:
                if is_multiple(run.step, config.train.eval_every):
                    run.evaluate()
                if is_multiple(run.step, config.train.cloze_every):
                    run.look()
                if (phase := run.next_phase) != run.phase:
                    run.enter(phase)
                    if has_budget:
                        run.time_evaluation()
                read = run.update(run.next_batch())
                seen: dict[str, Any] = unread() if unread else {}
                unread = read
                progress_bar.update(bar, completed=run.progress)

                times_save = has_budget and run.step == first  # the last one has to fit into the budget, too
                is_due = times_save or is_multiple(run.step, config.train.checkpoint_every)
                looks = (config.train.eval_every, config.train.cloze_every)
                is_pause = is_due or run.is_over or any(is_multiple(run.step, n) for n in looks)
                asked = run.asks(seen)
                if is_pause or asked:  # what follows is of the step that was just made
                    seen, unread = unread(), None
                    asked = run.asks(seen) or asked
                if asked == "end":
                    run.give_up()
                elif asked == "stop":
                    raise preemption.Stopped
                elif is_due or run.is_over:
                    run.save(times_save, is_last=run.is_over)
        except preemption.Stopped:
            if unread:
                unread()
            run.save(is_last=True)
            log(f"stopped by a signal; step {run.step} is saved. The same command goes on from there")
            return PREEMPTED
        stop.release()
        run.close()

        result = run.evaluate()
        if is_main:
            files.write_json(result_file, result)
            console.summary(workdir, run.trained(), result)
    return 0


def is_multiple(step: int, every: int) -> bool:
    """Whether something done every so many steps (0: never) is due."""
    return every > 0 and step > 0 and step % every == 0


def main(config: Config) -> int:
    if not _WORKDIR.value:
        raise UserError("--workdir is missing; name a folder for the run, such as --workdir=runs/first")
    bucket = gcs.parse("--workdir", _WORKDIR.value)
    folder = bucket or Path(_WORKDIR.value).expanduser().absolute()
    return train(config, folder, cluster_flags.from_flags())


if __name__ == "__main__":
    command.run(main)
