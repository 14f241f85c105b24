"""Making units as an Apache Beam pipeline: DirectRunner here, Dataflow, Flink or Spark elsewhere.

It runs in an environment of its own, see launch/beam-requirements.txt.
"""

import argparse
import contextlib
import io
import logging

import apache_beam as beam
from apache_beam.options.pipeline_options import PipelineOptions

from flax_mlm.config.schema import DataConfig
from flax_mlm.data.engines.worker import MakeUnit, last_line
from flax_mlm.data.prepare import Make
from flax_mlm.data.sources.base import Unit
from flax_mlm.data.work import Log, Work
from flax_mlm.errors import Failure, UserError, did_you_mean

_LOG_LEVEL = "--default_sdk_harness_log_level"


def engine(arguments: list[str]) -> Make:
    """Returns what makes units with Beam, once.

    Args:
      arguments: pipeline options, such as --runner=DataflowRunner.

    Raises:
      UserError: there is no such option, it cannot have this value, or the runner needs others.
    """
    options = _parse(arguments)
    try:
        pipeline = beam.Pipeline(options=options)
    except ValueError as e:  # in several lines
        raise UserError(f"--engine=beam: {' '.join(str(e).split())}; give them after --") from e
    runner = options.get_all_options()["runner"] or "DirectRunner"

    def make(units: list[Unit], work: Work, data: DataConfig, log: Log) -> None:
        log(f"tokenising: {len(units):,} units on Beam's {runner}")
        make_unit = MakeUnit(work, data)
        work.forget_failures()
        # Reshuffling divides the units among the workers; without it they are one bundle.
        _ = pipeline | beam.Create(units) | beam.Reshuffle() | "make units" >> beam.Map(_make_unit, make_unit)
        try:
            pipeline.run().wait_until_finish()
        except Exception as e:
            make_unit.check()
            remedy = "finished units are kept, run the same command again"
            raise Failure(f"Beam's {runner}: {last_line(e)}; {remedy}") from e
        make_unit.check()

    return make


def _make_unit(unit: Unit, make_unit: MakeUnit) -> int:
    return make_unit(unit)


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
