"""Trains, evaluates and saves a model.

    python -m flax_mlm.train --config=quickstart --workdir=runs/quickstart

The same line starts a run, continues one that was interrupted, and reports a finished one.
"""

import contextlib
import functools
import os
import time
from pathlib import Path

from absl import flags

from flax_mlm.checkpoint import store
from flax_mlm.cli import app, console, output
from flax_mlm.config import phases, validate
from flax_mlm.config.load import flatten
from flax_mlm.config.schema import Config
from flax_mlm.distributed import environment, preemption, processes
from flax_mlm.distributed.cluster import ClusterConfig
from flax_mlm.errors import PREEMPTED, Preempted, as_failure
from flax_mlm.inference.config import pinned
from flax_mlm.storage import files, gcs


def train(config: Config, workdir: str | os.PathLike[str], cluster: ClusterConfig | None = None) -> dict[str, float]:
    """Trains a model, saves and evaluates it; continues the run in `workdir` if there is one.

    Args:
      config: from `flax_mlm.config.load`.
      workdir: folder of the run, or gs://BUCKET/FOLDER: checkpoints/, metrics.jsonl, config.json, result.json.
      cluster: where the other processes are; None: as the environment says, else there is one process.

    Returns:
      The held-out metrics of the final model, as in result.json (see `evaluation.mlm.run`).

    Raises:
      UserError: the config does not fit the devices, the corpus or the run in `workdir`.
      Failure: the run cannot go on: the model diverged, a process was lost, or saving failed.
      Preempted: SIGTERM or SIGINT came; the last step is saved, and the same call continues.
    """
    started = time.monotonic()
    validate.check_complete(config)
    config = pinned(config)
    workdir = gcs.parse("--workdir", str(workdir)) or Path(workdir).expanduser().absolute()
    store.check_name("--workdir", workdir)
    with contextlib.ExitStack() as stack:
        stack.enter_context(output.guarded())
        stop = stack.enter_context(preemption.Stop())
        environment.prepare(config.train.batch_groups if config.train.reproducible else 0)

        # Heavy imports wait until the config is known to be right.
        from flax_mlm.distributed import jax_options

        identity = jax_options.recorded() | flatten(config.to_dict())
        group = stack.enter_context(processes.join(cluster or ClusterConfig(), identity, config.train.stall_timeout))
        stop.leave = lambda reason: group.leave(PREEMPTED, reason)
        is_main, log = group.index == 0, console.log if group.index == 0 else lambda *_: None
        status = console.RunStatus(group)
        screen = output.Status(status.line)
        if is_main:
            stack.enter_context(screen)
        run_phases = phases.parse_phases(config)
        log(console.recipe(run_phases, workdir))

        from flax_mlm.data import mixture
        from flax_mlm.distributed.mesh import check_batch, make_mesh, use_mesh
        from flax_mlm.storage.lease import Lease, holder
        from flax_mlm.training import loop, run_config
        from flax_mlm.training.budget import Budget
        from flax_mlm.training.logging import RunContext
        from flax_mlm.training.metrics import Writers

        # The devices of all processes.
        mesh = make_mesh(config.mesh)
        for t in (phase.config.train for phase in run_phases):
            check_batch("train.global_batch_size", t.global_batch_size, mesh, t.gradient_accumulation_steps)
        check_batch("eval.batch_size", config.eval.batch_size, mesh)
        if config.train.reproducible:
            check_batch("train.batch_groups", config.train.batch_groups, mesh)
        stack.enter_context(use_mesh(mesh))
        log(console.devices(mesh))

        # The workdir, to which process 0 alone writes.
        stack.enter_context(gcs.errors(workdir))
        gcs.check("--workdir", workdir)
        lease = budget = None
        if is_main:
            run_config.refuse_foreign(workdir)
            lease = Lease(workdir, group.run_id)
            stack.callback(lease.release)
            group.at_leave(lease.release)
            lease.take(log)

        # The corpora of each phase, as packed rows of tokens.
        with group.untimed("opening the corpus"):
            mixtures = mixture.open_corpora([phase.config for phase in run_phases], log)
        group.check_same("corpus", mixture.fingerprint_of(mixtures))
        group.check_same("--workdir", holder(workdir))
        layout = functools.partial(mixture.phases_of, mixtures=mixtures)
        run_phases = layout(config)
        log(console.data(run_phases, mixtures))
        if is_main:
            run_config.take(workdir, config, log, layout)
            if config.train.budget_minutes:
                begins = [phase.begin for phase in run_phases]
                budget = Budget(workdir, 60 * config.train.budget_minutes, started, begins)
                stack.callback(budget.close)

        # Model and optimizer: from the newest sound checkpoint, from a Hugging Face folder, or new.
        run = loop.Run(RunContext(config, workdir, run_phases, mixtures, mesh, group, stop, log, lease, budget))
        if is_main:
            run_config.record(workdir, config)
        result_file = workdir / "result.json"
        if run.is_over and (result := files.read_result(result_file)):
            if is_main:
                print(f"this run is finished: {run.step} steps are done")
                console.summary(workdir, run.model(), result)
            return result
        log(console.model(run_phases[0].config, mixtures[0].seq_len, run.training_of[0]))
        log("compiling   the train step")
        if memory := run.compile():
            log(console.memory(memory))
        writers = None
        with group.untimed("starting the data pipeline"):
            if is_main:
                result_file.unlink(missing_ok=True)
                writers = Writers(workdir, config, run.step)
                stack.callback(writers.close)
            run.begin(writers)
        status.run = run

        # Training.
        stop.hold()
        try:
            if config.init_from and run.step == 0 and not config.train.budget_minutes:  # a budget evaluates anyway
                run.attempt(run.evaluate)
            while not run.is_over:
                if loop.is_multiple(run.step, config.train.eval_every):
                    run.attempt(run.evaluate)
                if loop.is_multiple(run.step, config.train.cloze_every):
                    run.attempt(run.evaluate_clozes)
                if run.next_phase != run.phase:
                    run.start_phase()
                run.calibrate_budget()
                run.make_step()
                if run.save_is_due:
                    run.save(is_last=run.is_over)
        except preemption.Stopped:
            run.save(is_last=True)
            message = f"stopped by a signal; step {run.step} is saved. The same command continues"
            log(message)
            raise Preempted(message) from None
        except loop.Diverged as e:
            run.save(is_last=True, gave_up=str(e))
            raise
        stop.release()
        screen.draw()
        run.close()

        # The result.
        result = run.evaluate()
        if is_main:
            with as_failure(f"{result_file} cannot be written"):
                files.write_json(result_file, result)
            console.summary(workdir, run.model(), result)
    return result


if __name__ == "__main__":
    from flax_mlm.cli import cluster

    where = "folder of the run, or gs://BUCKET/FOLDER: checkpoints, metrics.jsonl, config.json"
    flags.DEFINE_string("workdir", "", where)
    flags.adopt_module_key_flags(cluster)

    def main(config: Config) -> None:
        workdir = app.required("workdir", "name a folder for the run, such as --workdir=runs/first")
        train(config, workdir, cluster.from_flags())

    app.run(main, prints_log=True)
