r"""Makes a tokenizer and a packed corpus from documents, or a tokenizer alone for several corpora.

    python -m flax_mlm.prepare --config=base --config.data.source='text:books/*.txt.gz' --output=corpus

    python -m flax_mlm.prepare --config=base --config.data.source='text:en/*.txt|text:sw/*.txt' --tokenizer_only \
        --config.data.sampling_alpha=0.3 --output=tokenizer

Killed at any moment and started again, it continues, and ends with the same bytes, which do not depend on the number of
workers either. Unfinished work is kept in OUTPUT.tmp, which is removed at the end.

Several machines that share a folder or a bucket may make a corpus together: each makes a shard (--shard=K/N), and
--merge joins them; or an engine (--engine=beam, --engine=ray) does both. Arguments after -- go to the engine.
"""

import importlib
import importlib.util
import re

from absl import flags

from flax_mlm.cli import app
from flax_mlm.config.schema import Config
from flax_mlm.data.engines.worker import Run
from flax_mlm.data.mixture import check_words
from flax_mlm.data.prepare import merge, prepare, prepare_shard
from flax_mlm.data.shared_tokenizer import make_tokenizer
from flax_mlm.errors import UserError

flags.DEFINE_string("output", "", "folder to make, also gs:// or s3://; unfinished work is kept in OUTPUT.tmp")
_SHARD = flags.DEFINE_string("shard", None, "K/N: make the units of the K-th of N workers, which may run at any time")
_MERGE = flags.DEFINE_bool("merge", False, "join the shards, after all of them")
_help = "make a tokenizer for all of data.source ('A|B|C'), each with bytes in proportion to its size ** sampling_alpha"
_TOKENIZER_ONLY = flags.DEFINE_bool("tokenizer_only", False, _help)
_PACKAGES = {"beam": "apache_beam", "ray": "ray"}
_ENGINE = flags.DEFINE_enum("engine", "local", ["local", *_PACKAGES], "makes the units; arguments after -- go to it")


def main(config: Config) -> None:
    output = app.required("output", "name the folder to make")
    engine = _engine(app.arguments_after_dashes())
    if sum([_SHARD.value is not None, _MERGE.value, _ENGINE.value != "local", _TOKENIZER_ONLY.value]) > 1:
        what = "--shard, --merge, --engine and --tokenizer_only exclude each other"
        raise UserError(f"{what}; give one of them (an engine merges by itself)")
    if _TOKENIZER_ONLY.value:
        make_tokenizer(config, app.required_folder("output", "name the folder to make").absolute())
        return
    if config.data.sampling_alpha != 1.0 and "|" in config.data.source:
        what = "data.sampling_alpha weights corpora in training, and sources with --tokenizer_only"
        print(f"note: {what}; this corpus holds all text of all sources, without weights")
    if _SHARD.value is not None:  # an empty one is a variable that is not set, and no wish for the whole corpus
        prepare_shard(config, output, *_parse_shard(_SHARD.value))
    else:
        check_words(config, merge(config, output) if _MERGE.value else prepare(config, output, run=engine), print)


def _parse_shard(text: str) -> tuple[int, int]:
    match = re.fullmatch(r"(\d+)/(\d+)", text, re.ASCII)
    shard, num_shards = map(int, match.groups()) if match else (0, 0)
    if not 1 <= shard <= num_shards:
        raise UserError(f"--shard is '{text}'; expected K/N with 1 <= K <= N, such as 3/16")
    return shard, num_shards


def _engine(arguments: list[str]) -> Run | None:
    """Returns what works on the units; None: this machine does.

    Raises:
      UserError: the engine is not installed, or does not take the arguments.
    """
    name = _ENGINE.value
    if name == "local":
        if arguments:
            raise UserError(f"unexpected argument '{arguments[0]}' after --; those go to --engine=beam or --engine=ray")
        return None
    if importlib.util.find_spec(_PACKAGES[name]) is None:
        remedy = f"in an environment of its own: pip install -r launch/{name}-requirements.txt"
        raise UserError(f"--engine={name} needs the package {_PACKAGES[name]}, {remedy}")
    run: Run = importlib.import_module(f"flax_mlm.data.engines.{name}").engine(arguments)
    return run


if __name__ == "__main__":
    app.run(main, prints_log=True, passes_arguments=True)
