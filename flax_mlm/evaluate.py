"""Command: checkpoint -> task -> table.

python -m flax_mlm.evaluate --checkpoint=runs/quickstart --task=mlm --json=result.json
python -m flax_mlm.evaluate --checkpoint=runs/quickstart --task=minimal_pairs --data=blimp/
"""

from collections.abc import Callable
from pathlib import Path
from typing import Any

from absl import flags

from flax_mlm import command, processes
from flax_mlm.config import Config, flatten
from flax_mlm.errors import UserError

_CHECKPOINT = flags.DEFINE_string(
    "checkpoint", "", "a run's workdir (its newest checkpoint), WORKDIR@STEP, a folder, or a Hugging Face folder"
)
_TASK = flags.DEFINE_enum(
    "task",
    "mlm",
    ["mlm", "cloze", "minimal_pairs"],
    "mlm: loss and accuracy on the held-out rows; cloze: ranks of the words that belong in a hole; minimal_pairs: is "
    "the good sentence likelier than the bad one?",
)
_DATA = flags.DEFINE_string("data", "", "cloze: a file of lines `text with [MASK]<TAB>answer`; minimal_pairs: .jsonl")
_VARIANT = flags.DEFINE_enum(
    "variant", "within_word_l2r", ["original", "within_word_l2r"], "minimal_pairs: of the pseudo-log-likelihood"
)
_JSON = flags.DEFINE_string("json", "", "also write the result to this file")

flags.adopt_module_key_flags(processes)


def main(config: Config) -> None:
    import jax

    from flax_mlm import metrics, trained

    task = {"mlm": _mlm, "cloze": _cloze, "minimal_pairs": _minimal_pairs}[_TASK.value]
    identity = {"--checkpoint": _CHECKPOINT.value, "--task": _TASK.value, **flatten(config.to_dict())}
    with processes.join(identity, config.train.stall_timeout) as roster:
        with roster.untimed("opening the checkpoint"):
            model = trained.restore(_CHECKPOINT.value, config)

        def poll() -> bool:
            roster.progress("evaluating")
            return False

        with jax.set_mesh(model.mesh):
            result, table = task(model, roster, poll)
        if roster.index == 0:
            print("\n".join(table))
            if _JSON.value:
                metrics.write_json(Path(_JSON.value), result)


Answer = tuple[dict[str, Any], list[str]]  # result, and as lines


def _mlm(model: Any, roster: Any, poll: Callable[[], bool]) -> Answer:
    from flax_mlm import sharding
    from flax_mlm.prepare import open_corpus
    from flax_mlm.tasks import mlm

    config = model.config
    sharding.check_batch("eval.batch_size", config.eval.batch_size, model.mesh)
    with roster.untimed("opening the corpus"):
        corpus = open_corpus(config)
    if corpus.tokenizer().fingerprint != model.tokenizer.fingerprint:
        raise UserError(f"data.corpus: {corpus.path} was made with another tokenizer than {_CHECKPOINT.value}")
    result = mlm.run(model, corpus, poll)
    return result, mlm.table(result, config.objective.name)


def _cloze(model: Any, roster: Any, poll: Callable[[], bool]) -> Answer:
    from flax_mlm.tasks import cloze

    result = cloze.run(model, cloze.read(_DATA.value))
    return result, cloze.table(result)


def _minimal_pairs(model: Any, roster: Any, poll: Callable[[], bool]) -> Answer:
    from flax_mlm.tasks import minimal_pairs

    if not _DATA.value:
        raise UserError("--data is missing; name a .jsonl file of pairs, or a folder of such")
    result = minimal_pairs.run(model, minimal_pairs.read(_DATA.value), _VARIANT.value, poll)
    return result, minimal_pairs.table(result)


if __name__ == "__main__":
    command.run(main, from_checkpoint=True)
