"""Writes a checkpoint as a Hugging Face folder that transformers loads as it is.

python -m flax_mlm.export --checkpoint=runs/quickstart --output=exported --check

Needs neither torch nor transformers, except for --check.
"""

from absl import flags

from flax_mlm.cli import app
from flax_mlm.config.schema import Config
from flax_mlm.errors import Failure

flags.DEFINE_string("output", "", "the folder to create")
_ARCHITECTURES = ["", "bert", "roberta", "albert", "distilbert", "xlm-roberta", "camembert", "modernbert", "electra"]
flags.DEFINE_enum("architecture", "", _ARCHITECTURES, "empty: the first one that fits")
flags.DEFINE_enum("dtype", "float32", ["float32", "bfloat16"], "dtype of the weights")
flags.DEFINE_string("licence", "", "licence of the model, for its card, as Hugging Face spells it: apache-2.0, mit")
flags.DEFINE_string("language", "", "language of the text, for the card: en, de, multilingual")
flags.DEFINE_bool("check", False, "load the folder in transformers and compare on real text; exit 1 if it differs")

LIMIT = 1e-4  # largest difference of a hidden state or a logit that --check allows


def main(config: Config) -> None:
    values = flags.FLAGS
    output = app.required_folder("output", "name the folder to create, such as --output=exported").absolute()

    import jax

    from flax_mlm.inference import parity
    from flax_mlm.inference.export import export

    if values.check:
        parity.require_transformers()
    with jax.default_matmul_precision("highest"):
        card = values.licence, values.language
        model = export(values.checkpoint, output, config, values.architecture, values.dtype, *card)
        size = sum(f.stat().st_size for f in output.iterdir())
        print(f"written to {output}, {size / 2**20:,.1f} MiB")
        if values.check:
            difference = parity.compare_folder(output, model)
            print("\n".join(difference.lines()))
            if not difference.is_within(LIMIT):
                raise Failure(f"'{output}' computes something else in transformers")


if __name__ == "__main__":
    app.run(main, from_checkpoint=True, prints_log=True)
