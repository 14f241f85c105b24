"""Command: checkpoint -> task -> table.

python -m flax_mlm.evaluate --checkpoint=runs/quickstart --task=mlm --json=result.json
"""

from pathlib import Path

from absl import flags

from flax_mlm import command, processes
from flax_mlm.config import Config, flatten
from flax_mlm.errors import UserError

_CHECKPOINT = flags.DEFINE_string(
    "checkpoint", "", "a run's workdir (its newest checkpoint), WORKDIR@STEP, or a folder"
)
_TASK = flags.DEFINE_enum("task", "mlm", ["mlm"], "mlm: loss and accuracy on the held-out rows")
_JSON = flags.DEFINE_string("json", "", "also write the result to this file")

flags.adopt_module_key_flags(processes)


def main(config: Config) -> None:
    import jax

    from flax_mlm import metrics, sharding, trained
    from flax_mlm.prepare import open_corpus
    from flax_mlm.tasks import mlm

    identity = {"--checkpoint": _CHECKPOINT.value, **flatten(config.to_dict())}
    with processes.join(identity, config.train.stall_timeout) as roster:
        with roster.untimed("opening the checkpoint and the corpus"):
            model = trained.restore(_CHECKPOINT.value, config)
            sharding.check_batch("eval.batch_size", config.eval.batch_size, model.mesh)
            corpus = open_corpus(config)
        if corpus.tokenizer().fingerprint != model.tokenizer.fingerprint:
            raise UserError(f"data.corpus: {corpus.path} was made with another tokenizer than {_CHECKPOINT.value}")

        def poll() -> bool:
            roster.progress("evaluating")
            return False

        with jax.set_mesh(model.mesh):
            result = mlm.run(model, corpus, poll)
        if roster.index == 0:
            print("\n".join(mlm.table(result, config.objective.name)))
            if _JSON.value:
                metrics.write_json(Path(_JSON.value), result)


if __name__ == "__main__":
    command.run(main, from_checkpoint=True)
