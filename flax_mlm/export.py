"""Command: checkpoint -> a Hugging Face folder that transformers loads as it is.

python -m flax_mlm.export --checkpoint=runs/quickstart --output=exported --check

Needs neither torch nor transformers, except for --check.
"""

from absl import flags

from flax_mlm.cli import app
from flax_mlm.config.schema import Config
from flax_mlm.errors import Failure, UserError
from flax_mlm.storage import gcs

_CHECKPOINT = flags.DEFINE_string(
    "checkpoint", "", "a run's workdir (its newest checkpoint), WORKDIR@STEP, a folder, or a Hugging Face folder"
)
_OUTPUT = flags.DEFINE_string("output", "", "the folder to create")
_ARCHITECTURE = flags.DEFINE_enum(
    "architecture", "", ["", "bert", "roberta", "albert", "modernbert", "electra"], "empty: the first one that fits"
)
_DTYPE = flags.DEFINE_enum("dtype", "float32", ["float32", "bfloat16"], "dtype of the weights")
_LICENCE = flags.DEFINE_string(
    "licence", "", "licence of the model, for its card, as Hugging Face spells it: apache-2.0, mit"
)
_LANGUAGE = flags.DEFINE_string("language", "", "language of the text, for the card: en, de, multilingual")
_CHECK = flags.DEFINE_bool(
    "check", False, "load the folder in transformers and compare on real text; exit 1 if it differs"
)

LIMIT = 1e-4  # largest difference of a hidden state or a logit that --check allows


def main(config: Config) -> None:
    if not _OUTPUT.value:
        raise UserError("--output is missing; name the folder to create, such as --output=exported")
    output = gcs.local("--output", _OUTPUT.value).absolute()

    import jax

    from flax_mlm.inference import parity
    from flax_mlm.inference.export import export

    if _CHECK.value:
        parity.require_transformers()
    with jax.default_matmul_precision("highest"):
        model = export(
            _CHECKPOINT.value, output, config, _ARCHITECTURE.value, _DTYPE.value, _LICENCE.value, _LANGUAGE.value
        )
        size = sum(f.stat().st_size for f in output.iterdir())
        print(f"written to {output}, {size / 2**20:,.1f} MiB")
        if _CHECK.value:
            difference = parity.compare_folder(output, model)
            print("\n".join(difference.lines()))
            if not difference.is_within(LIMIT):
                raise Failure(f"'{output}' computes something else in transformers")


if __name__ == "__main__":
    app.run(main, from_checkpoint=True)
