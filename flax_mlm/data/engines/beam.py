"""Working on units as an Apache Beam pipeline: DirectRunner here, Dataflow, Flink or Spark elsewhere.

It runs in an environment of its own, see launch/beam-requirements.txt.
"""

import argparse
import contextlib
import io
import logging
import queue
import threading

import apache_beam as beam
from apache_beam.options.pipeline_options import PipelineOptions

from flax_mlm.data.engines.worker import Run, Task, last_line
from flax_mlm.data.sources.base import Unit
from flax_mlm.data.work import Log
from flax_mlm.errors import Failure, UserError, did_you_mean

_LOG_LEVEL = "--default_sdk_harness_log_level"


def engine(arguments: list[str]) -> Run:
    """Returns what works on units with Beam.

    Args:
      arguments: pipeline options, such as --runner=DataflowRunner.

    Raises:
      UserError: there is no such option, it cannot have this value, or the runner needs others.
    """
    options = _parse(arguments)
    try:
        beam.Pipeline(options=options)
    except ValueError as e:  # in several lines
        raise UserError(f"--engine=beam: {' '.join(str(e).split())}; give them after --") from e
    runner = options.get_all_options()["runner"] or "DirectRunner"

    def run(task: Task, units: list[Unit], log: Log) -> None:
        log(f"{task.title}: {len(units):,} units on Beam's {runner}")
        task.work.forget_failures()
        pipeline = beam.Pipeline(options=options)
        # Reshuffling divides the units among the workers; without it they are one bundle.
        _ = pipeline | beam.Create(units) | beam.Reshuffle() | task.title >> beam.Map(_call, task)
        try:
            _run(pipeline)
        except Exception as e:
            task.check()
            remedy = "finished units are kept, run the same command again"
            raise Failure(f"Beam's {runner}: {last_line(e)}; {remedy}") from e
        task.check()

    return run


def _run(pipeline: beam.Pipeline) -> None:
    """Runs a pipeline to its end. Raises what it raises, also in a thread of Beam: where a process of the DirectRunner
    is killed, only a thread says so, and the pipeline never ends."""
    ends: queue.SimpleQueue[BaseException | None] = queue.SimpleQueue()

    def run() -> None:
        try:
            pipeline.run().wait_until_finish()
            ends.put(None)
        except Exception as e:
            ends.put(e)

    before, threading.excepthook = threading.excepthook, lambda failed: ends.put(failed.exc_value)
    try:
        threading.Thread(target=run, daemon=True).start()
        if error := ends.get():
            raise error
    finally:
        threading.excepthook = before


def _call(unit: Unit, task: Task) -> int:
    return task(unit)


def _parse(arguments: list[str]) -> PipelineOptions:
    """Parses pipeline options. Raises UserError; Beam itself ignores what it does not know."""
    parser = argparse.ArgumentParser(allow_abbrev=False, add_help=False)
    for options in PipelineOptions.__subclasses__():
        with contextlib.suppress(argparse.ArgumentError):  # several have the same option
            options._add_argparse_args(parser)
    errors = io.StringIO()
    try:
        with contextlib.redirect_stderr(errors):
            _, unknown = parser.parse_known_args(arguments)
    except SystemExit as e:
        message = errors.getvalue().strip().splitlines()[-1].partition("error: ")[2]
        raise UserError(f"--engine=beam: {message}; correct what follows --") from e
    if unknown:
        name = unknown[0].partition("=")[0]
        hint = did_you_mean(name, parser._option_string_actions, "options of the pipeline look like --runner=NAME")
        raise UserError(f"--engine=beam: Beam has no option {name}; {hint}")
    # What Beam would log of exceptions are those that are raised here as well.
    logging.getLogger("apache_beam").setLevel(logging.CRITICAL)
    is_quiet = not any(argument.startswith(_LOG_LEVEL) for argument in arguments)
    return PipelineOptions([*arguments, *[f"{_LOG_LEVEL}=CRITICAL"] * is_quiet])
