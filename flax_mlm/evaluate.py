"""Evaluates a checkpoint on a task, fine-tuned first where the task has training data.

python -m flax_mlm.evaluate --checkpoint=runs/quickstart --task=mlm --json=result.json
python -m flax_mlm.evaluate --checkpoint=runs/quickstart --task=minimal_pairs --data=blimp/
python -m flax_mlm.evaluate --checkpoint=runs/quickstart --task=classification --train=sst2/train.tsv --dev=sst2/dev.tsv
"""

import functools

from absl import flags

from flax_mlm.cli import app, cluster
from flax_mlm.config.load import flatten
from flax_mlm.config.schema import Config
from flax_mlm.distributed import processes
from flax_mlm.errors import UserError
from flax_mlm.evaluation import registry
from flax_mlm.evaluation.registry import TASKS
from flax_mlm.storage import files, gcs

_TEXTS = {
    "data": "test data. cloze: lines `text with [MASK]<TAB>answer`, empty: built-in clozes; minimal_pairs: a .jsonl "
    "file, a folder of them, or tfds:blimp/NAME",
    "train": "training data. classification: a table, .jsonl or tfds:NAME:split; tagging: CoNLL format; retrieval: a "
    "file of pairs with columns query, positive, negative, a file of lines, or a BEIR folder. Empty: "
    "no fine-tuning; classification and tagging use the checkpoint's own head",
    "dev": "development data, which chooses learning rate and epoch; empty: a tenth of --train",
    "test": "test data; empty: --dev. retrieval: a BEIR folder, or pairs of sentences with scores",
    "text": "column of the text: its name, or its number from 1 in a table without header",
    "pair": "column of the second text",
    "label": "column of the label or score, or of several labels; or several columns of 0 and 1, such as toxic,insult",
    "label_separator": "between the labels of a text, for --metric=f1_micro and f1_macro; empty: a comma",
    "columns": "numbers of the columns of token and tag (--task=tagging), such as 1,4; empty: the first and the last",
    "save": "new folder for what was fine-tuned, encoder and head: a checkpoint that is evaluated without --train",
    "json": "file to write the result to",
}
for _name, _help in _TEXTS.items():
    flags.DEFINE_string(_name, "", _help)
flags.DEFINE_enum("task", "mlm", list(TASKS), "; ".join(f"{name}: {task.help}" for name, task in TASKS.items()))
_help = "additional mask rates to evaluate at (--task=mlm); empty: only eval.mask_rate"
flags.DEFINE_string("mask_rates", "0.05,0.15,0.3,0.5", _help)
_help = "pseudo-log-likelihood variant (--task=minimal_pairs)"
flags.DEFINE_enum("variant", "within_word_l2r", ["original", "within_word_l2r"], _help)
_help = (
    "metric for --task=classification; spearman and pearson select regression, f1_micro and f1_macro several labels a "
    "text; empty: that of the checkpoint's head without --train, else accuracy"
)
_METRICS = ["", "accuracy", "f1", "f1_micro", "f1_macro", "matthews", "spearman", "pearson"]
flags.DEFINE_enum("metric", "", _METRICS, _help)
flags.adopt_module_key_flags(cluster)


def main(config: Config) -> None:
    from flax_mlm.inference.load import load_model

    task, values = TASKS[flags.FLAGS.task], flags.FLAGS
    for flag in sorted({flag for other in TASKS.values() for flag in other.flags} - set(task.flags)):
        if values[flag].present:
            takes = ", ".join(f"--{name}" for name in task.flags)
            raise UserError(f"--{flag} is not used by --task={values.task}; it takes {takes}")
    gcs.local("--save", values.save)
    output = gcs.local("--json", values.json)
    identity = {"--checkpoint": values.checkpoint, "--task": values.task, **flatten(config.to_dict())}
    with processes.join(cluster.from_flags(), identity, config.train.stall_timeout) as group:
        if values.json and group.index == 0:
            files.check_writable("--json", output)
        with group.untimed("opening the checkpoint and the data"):  # until the first batch
            model = load_model(values.checkpoint, config)
            on_batch = functools.partial(group.progress, "evaluating")
            flags_of_task = {flag: values[flag].value for flag in task.flags}
            result, table = registry.evaluate(values.task, model, on_batch, **flags_of_task)
        if group.index == 0:
            print("\n".join(table))
            if values.json:
                files.write_json(output, result)


if __name__ == "__main__":
    app.run(main, from_checkpoint=True)
