"""Ranks words for each [MASK] in a text.

python -m flax_mlm.fill_mask --checkpoint=runs/quickstart "The [MASK] of the United States."
python -m flax_mlm.fill_mask --checkpoint=runs/quickstart --targets=war,peace "We are at [MASK] with them."
"""

from absl import flags

from flax_mlm.cli import app
from flax_mlm.config.schema import Config
from flax_mlm.errors import UserError

_TEXT = flags.DEFINE_string("text", "", "the text, if it is not the last argument")
_TOP_K = flags.DEFINE_integer("top_k", 5, "number of words shown for each [MASK]", lower_bound=1)
_TARGETS = flags.DEFINE_list("targets", [], "rank only these words (comma-separated); each may have several tokens")


def main(config: Config) -> None:
    from flax_mlm.inference.load import load_model
    from flax_mlm.inference.mask_filler import MaskFiller

    if config.objective.name != "mlm":
        raise UserError(f"objective.name is {config.objective.name}; expected mlm, the objective that fills masks")
    filler = MaskFiller(load_model(flags.FLAGS.checkpoint, config))
    text, k = _TEXT.value, _TOP_K.value
    targets = [target.strip() for target in _TARGETS.value]
    masks = [filler.rank_words(text, targets)] if targets else filler.top_words(text, k)
    for number, ranked in enumerate(masks, 1):
        if len(masks) > 1:
            print(f"[MASK] {number}")
        for word, probability in ranked:
            print(f"{probability:8.4f}  {word}")
    if unknown := filler.unknown(text, targets):
        print(f"note: the vocabulary cannot spell {', '.join(unknown)}: probability 0")
    if len(masks) > 1:
        print("all masks together")
        for filled, probability in filler.top_fillings(text, k):
            print(f"{probability:8.4f}  {filled}")


if __name__ == "__main__":
    app.run(main, from_checkpoint=True, positional="text")
