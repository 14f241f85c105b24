"""Writes a checkpoint as a Hugging Face folder that transformers loads as it is.

python -m flax_mlm.export --checkpoint=runs/quickstart --output=exported --check
python -m flax_mlm.export --checkpoint=runs/quickstart --push_to=hf:ORG/NAME --private

python -m flax_mlm.export --checkpoint=runs/quickstart --output=served --onnx --int8

Needs neither torch nor transformers, except for --check and --onnx.
"""

import contextlib
import tempfile
from pathlib import Path
from typing import Any

from absl import flags

from flax_mlm.cli import app
from flax_mlm.config.schema import Config
from flax_mlm.errors import Failure, UserError
from flax_mlm.hf import push

flags.DEFINE_string("output", "", "the folder to create; with --push_to it may be empty")
_ARCHITECTURES = ["", "bert", "roberta", "albert", "distilbert", "xlm-roberta", "camembert", "modernbert", "electra"]
flags.DEFINE_enum("architecture", "", _ARCHITECTURES, "empty: the first one that fits")
flags.DEFINE_enum("dtype", "float32", ["float32", "bfloat16"], "dtype of the weights")
flags.DEFINE_string("licence", "", "licence of the model, for its card, as Hugging Face spells it: apache-2.0, mit")
flags.DEFINE_string("language", "", "language of the text, for the card: en, de, multilingual")
flags.DEFINE_bool("check", False, "load the folder in transformers and compare on real text; exit 1 if it differs")
_PUSH_TO = flags.DEFINE_string("push_to", "", "hf:ORG/NAME: upload the folder to the Hugging Face Hub, in one commit")
_PRIVATE = flags.DEFINE_bool("private", False, "make the repository of --push_to a private one")
flags.DEFINE_bool("onnx", False, "also write onnx/model.onnx, float32, with measurements; needs torch and onnxruntime")
flags.DEFINE_bool("int8", False, "with --onnx: also write onnx/model_quantized.onnx, its weights in int8")
_LARGEST_DROP = 0.02
_DROP = "with --onnx: refuse to write a model that may lose more: nats of the held-out loss, or 1 - cosine of vectors"
flags.DEFINE_float("max_drop", _LARGEST_DROP, _DROP, lower_bound=0.0)

LIMIT = 1e-4  # largest difference of a hidden state or a logit that --check allows


def main(config: Config) -> None:
    values = flags.FLAGS
    for name in ("int8", "max_drop"):
        if values[name].present and values[name].value is not False and not values.onnx:
            raise UserError(f"--{name} is {values[name].value}, but --onnx is not set; add --onnx")
    repository = push.open_repository("--push_to", _PUSH_TO.value, _PRIVATE.value) if _PUSH_TO.value else None
    if _PRIVATE.value and not repository:
        raise UserError("--private is for --push_to, which is empty; give --push_to=hf:ORG/NAME")
    with contextlib.ExitStack() as stack:
        if repository and not values.output:
            folder = stack.enter_context(tempfile.TemporaryDirectory())
            output = Path(folder, repository.name.partition("/")[2])
        else:
            output = app.required_folder("output", "name the folder to create, such as --output=exported").absolute()
        _export(config, output)
        if repository:
            print(f"pushed to {repository.push(output)}")


def _export(config: Config, output: Path) -> None:
    values = flags.FLAGS

    import jax

    from flax_mlm.evaluation.onnx_drop import write_onnx
    from flax_mlm.inference import onnx, parity
    from flax_mlm.inference.export import export

    if values.onnx:
        onnx.require_packages()
    if values.check:
        parity.require_transformers()
    with jax.default_matmul_precision("highest"):
        reports: list[dict[str, Any]] = []

        def complete(folder: Path, model: Any) -> None:
            if values.onnx:
                reports.append(write_onnx(folder, model, values.int8, values.max_drop))

        card = values.licence, values.language
        model = export(values.checkpoint, output, config, values.architecture, values.dtype, *card, complete)
        size = sum(f.stat().st_size for f in output.rglob("*") if f.is_file())
        print(f"written to {output}, {size / 2**20:,.1f} MiB")
        for report in reports:
            print("\n".join(onnx.lines(report)))
        if values.check:
            difference = parity.compare_folder(output, model)
            print("\n".join(difference.lines()))
            if not difference.is_within(LIMIT):
                raise Failure(f"'{output}' computes something else in transformers")


if __name__ == "__main__":
    app.run(main, from_checkpoint=True, prints_log=True)
