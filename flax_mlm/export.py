"""Command: checkpoint -> a Hugging Face folder that transformers loads as it is.

python -m flax_mlm.export --checkpoint=runs/quickstart --output=exported --check

Needs neither torch nor transformers, except for --check.
"""

import dataclasses
import json
import os
import shutil
from pathlib import Path
from typing import Any

from absl import flags

from flax_mlm.cli import app as command
from flax_mlm.config.schema import Config
from flax_mlm.errors import Failure, UserError
from flax_mlm.storage import gcs

_CHECKPOINT = flags.DEFINE_string(
    "checkpoint", "", "a run's workdir (its newest checkpoint), WORKDIR@STEP, a folder, or a Hugging Face folder"
)
_OUTPUT = flags.DEFINE_string("output", "", "the folder to make")
_ARCHITECTURE = flags.DEFINE_enum(
    "architecture", "", ["", "bert", "roberta", "albert", "modernbert", "electra"], "empty: the first one that fits"
)
_DTYPE = flags.DEFINE_enum("dtype", "float32", ["float32", "bfloat16"], "of the weights")
_LICENCE = flags.DEFINE_string("licence", "", "of the model, for its card, as Hugging Face spells it: apache-2.0, mit")
_LANGUAGE = flags.DEFINE_string("language", "", "of the text, for the card: en, de, multilingual")
_CHECK = flags.DEFINE_bool(
    "check", False, "load the folder in transformers and compare on real text; exit 1 if it differs"
)

LIMIT = 1e-4  # largest difference of a hidden state or a logit that --check allows


def main(config: Config) -> None:
    if not _OUTPUT.value:
        raise UserError("--output is missing; name the folder to make, such as --output=exported")
    gcs.refuse("--output", _OUTPUT.value)
    output = Path(_OUTPUT.value).expanduser().absolute()
    if output.exists() and not (output.is_dir() and not any(output.iterdir())):
        raise UserError(f"--output: '{output}' exists; name another folder, or delete that one")

    import jax

    from flax_mlm.inference import load as trained
    from flax_mlm.inference import parity

    if _CHECK.value:
        parity.need()
    exact = dataclasses.replace(config, model=dataclasses.replace(config.model, dtype="float32"))
    with jax.default_matmul_precision("highest"):
        model = trained.restore(_CHECKPOINT.value, exact)
        if _DTYPE.value == "bfloat16":
            model = model._replace(params=jax.tree.map(lambda x: x.astype("bfloat16").astype(x.dtype), model.params))
        write(output, config, model)
        size = sum(f.stat().st_size for f in output.iterdir())
        print(f"written to {output}, {size / 2**20:,.1f} MiB")
        if _CHECK.value:
            found = parity.run(output, model)
            print("\n".join(found.lines()))
            if not found.is_same(LIMIT):
                raise Failure(f"'{output}' is not the same model in transformers")


def write(output: Path, config: Config, model: Any) -> None:
    """Writes the folder of a `trained.LoadedModel`, complete or not at all.

    Raises:
      UserError: transformers has no class for this encoder; or the folder cannot be written.
    """
    import jax
    import ml_dtypes

    from flax_mlm.hf import architecture as architecture_lib
    from flax_mlm.hf import folder, model_card, sentence_transformers, tokenizer_json
    from flax_mlm.model import electra, heads

    m, tokenizer = config.model, model.tokenizer
    architecture = folder.matching(m, config.objective.name, _ARCHITECTURE.value, tokenizer.tokens[tokenizer.cls_id])
    net, params = model.steps.model, jax.device_get(model.params)
    if config.objective.name == "rtd":  # the generator is not kept
        net = electra.discriminator(m, tokenizer.vocab_size)
        del params["generator"]
    where = list(architecture_lib.places(architecture, net, m.num_layers))
    tensors = architecture_lib.to_theirs(where, params, tokenizer.pad_id + 1)
    settings = folder.config_json(architecture, m, heads.vocab_rows(m, tokenizer.vocab_size), tokenizer)
    if _DTYPE.value == "bfloat16":
        tensors = {name: tensor.astype(ml_dtypes.bfloat16) for name, tensor in tensors.items()}
        settings["dtype"] = "bfloat16"
    card = model_card.text(
        output.name,
        architecture,
        config,
        sum(x.size for x in jax.tree.leaves(params)),
        tokenizer,
        model.meta,
        _result(model.meta["step"]) if model.meta else None,
        _LICENCE.value,
        _LANGUAGE.value,
    )
    temporary = output.with_name(output.name + ".tmp")
    try:
        shutil.rmtree(temporary, ignore_errors=True)
        temporary.mkdir(parents=True)
        (temporary / "tokenizer.json").write_bytes(
            tokenizer_json.content(tokenizer, min(1, max(0, m.type_vocab_size - 1)))
        )
        for name, content in {
            "config.json": settings,
            "tokenizer_config.json": tokenizer_json.settings(tokenizer, m.max_positions),
            "special_tokens_map.json": tokenizer_json.special_tokens(tokenizer),
            **(sentence_transformers.files(config) if "fine_tuned" in model.meta else {}),
        }.items():
            (temporary / name).parent.mkdir(exist_ok=True)
            (temporary / name).write_text(json.dumps(content, indent=2, ensure_ascii=False) + "\n", encoding="utf8")
        (temporary / "README.md").write_text(card, encoding="utf8")
        folder.write_tensors(temporary / folder.WEIGHTS, tensors)
        if output.exists():
            output.rmdir()
        os.replace(temporary, output)
    except OSError as e:
        raise UserError(f"--output: '{output}' cannot be written: {e.strerror or e}") from e
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


def _result(step: int) -> dict[str, float] | None:
    """What the run said of itself at its end, if that is the step at hand."""
    from flax_mlm.checkpoint.format import find_checkpoints
    from flax_mlm.checkpoint.store import saved_steps

    for folder in find_checkpoints(_CHECKPOINT.value):
        file = folder.parent.parent / "result.json"
        with gcs.errors(folder):
            # A run that goes on removes the file, and what comes last is what it is of.
            if saved_steps(file.parent)[-1:] == [step] and file.exists():
                return json.loads(file.read_text())
    return None


if __name__ == "__main__":
    command.run(main, from_checkpoint=True)
