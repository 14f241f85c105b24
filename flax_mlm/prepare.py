"""Makes a tokenizer and a packed corpus from documents.

    python -m flax_mlm.prepare --config=base --config.data.source='text:books/*.txt.gz' --output=corpus

Killed at any moment and started again, it continues, and ends with the same bytes, which do not depend on the number of
workers either. Unfinished work is kept in OUTPUT.tmp, which is removed at the end.
"""

from absl import flags

from flax_mlm.cli import app
from flax_mlm.config.schema import Config
from flax_mlm.data.mixture import check_words
from flax_mlm.data.prepare import prepare

flags.DEFINE_string("output", "", "folder to make; unfinished work is kept in OUTPUT.tmp")


def main(config: Config) -> None:
    check_words(config, prepare(config, app.required("output", "name the folder to make")), print)


if __name__ == "__main__":
    app.run(main, prints_log=True)
