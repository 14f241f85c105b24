"""Command: checkpoint + a text with [MASK] -> ranked words.

python -m flax_mlm.fill_mask --checkpoint=runs/quickstart "The [MASK] of the United States."
python -m flax_mlm.fill_mask --checkpoint=runs/quickstart --targets=war,peace "We are at [MASK] with them."
"""

from absl import flags

from flax_mlm.cli import app as command
from flax_mlm.config.schema import Config
from flax_mlm.errors import UserError

_CHECKPOINT = flags.DEFINE_string(
    "checkpoint", "", "a run's workdir (its newest checkpoint), WORKDIR@STEP, a folder, or a Hugging Face folder"
)
_TEXT = flags.DEFINE_string("text", "", "the text, when it is not given as the last argument")
_TOP_K = flags.DEFINE_integer("top_k", 5, "words shown for each [MASK]", lower_bound=1)
_TARGETS = flags.DEFINE_list("targets", [], "rank only these words (comma-separated); they may be longer than a piece")


def main(config: Config) -> None:
    from flax_mlm.inference.load import load_model
    from flax_mlm.inference.mask_filler import MaskFiller

    if config.objective.name != "mlm":
        raise UserError(f"this checkpoint was trained with objective {config.objective.name}; filling masks needs mlm")
    filler = MaskFiller(load_model(_CHECKPOINT.value, config))
    text = _TEXT.value
    answers = [filler.targets(text, _TARGETS.value)] if _TARGETS.value else filler.top(text, _TOP_K.value)
    for number, ranked in enumerate(answers, 1):
        if len(answers) > 1:
            print(f"[MASK] {number}")
        for word, probability in ranked:
            print(f"{probability:8.4f}  {word}")
    if len(answers) > 1:
        print("together")
        for filled, probability in filler.joint(text, _TOP_K.value):
            print(f"{probability:8.4f}  {filled}")


if __name__ == "__main__":
    command.run(main, from_checkpoint=True, positional="text")
