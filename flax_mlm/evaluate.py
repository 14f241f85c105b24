"""Command: checkpoint -> task -> table.

python -m flax_mlm.evaluate --checkpoint=runs/quickstart --task=mlm --json=result.json
python -m flax_mlm.evaluate --checkpoint=runs/quickstart --task=minimal_pairs --data=blimp/
python -m flax_mlm.evaluate --checkpoint=runs/quickstart --task=classification --train=sst2/train.tsv --dev=sst2/dev.tsv
"""

import dataclasses
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

from absl import flags

from flax_mlm.cli import app as command
from flax_mlm.cli import cluster
from flax_mlm.config.load import flatten
from flax_mlm.config.schema import Config
from flax_mlm.distributed import processes
from flax_mlm.errors import UserError
from flax_mlm.storage import gcs

_CHECKPOINT = flags.DEFINE_string(
    "checkpoint", "", "a run's workdir (its newest checkpoint), WORKDIR@STEP, a folder, or a Hugging Face folder"
)
_TASK = flags.DEFINE_enum(
    "task",
    "mlm",
    ["mlm", "cloze", "minimal_pairs", "classification", "tagging", "retrieval"],
    "mlm: loss and accuracy on the held-out rows, of clm and rtd too; cloze: ranks of the words that belong in a hole; "
    "minimal_pairs: is the good sentence likelier than the bad one? classification: fine-tuning for a label or number "
    "of a text or pair; tagging: fine-tuning for tags of words; retrieval: vectors for search, as they are or "
    "fine-tuned",
)
_DATA = flags.DEFINE_string(
    "data",
    "",
    "cloze: a file of lines `text with [MASK]<TAB>answer`; minimal_pairs: a .jsonl file, a folder of them, or "
    "tfds:blimp/NAME",
)
_MASK_RATES = flags.DEFINE_string(
    "mask_rates", "0.05,0.15,0.3,0.5", "mlm: at these too; empty: none but eval.mask_rate"
)
_VARIANT = flags.DEFINE_enum(
    "variant", "within_word_l2r", ["original", "within_word_l2r"], "minimal_pairs: of the pseudo-log-likelihood"
)
_TRAIN = flags.DEFINE_string(
    "train",
    "",
    "classification: a table, .jsonl or tfds:NAME:split; tagging: CoNLL format; retrieval: a file of pairs (query, "
    "positive, negative) or of lines, or a BEIR folder; empty: no fine-tuning",
)
_DEV = flags.DEFINE_string("dev", "", "to choose learning rate and epoch by; empty: a tenth of --train")
_TEST = flags.DEFINE_string(
    "test", "", "to be evaluated on; empty: --dev. retrieval: a BEIR folder, or pairs of sentences with scores"
)
_TEXT = flags.DEFINE_string("text", "", "name of the column of the text, or its number from 1 where none has a name")
_PAIR = flags.DEFINE_string("pair", "", "column of the second text, where there is one")
_LABEL = flags.DEFINE_string("label", "", "column of the label or score")
_METRIC = flags.DEFINE_enum(
    "metric",
    "accuracy",
    ["accuracy", "f1", "matthews", "spearman", "pearson"],
    "classification; the last two: regression",
)
_SAVE = flags.DEFINE_string("save", "", "retrieval: keep the fine-tuned encoder in this folder, a --checkpoint again")
_JSON = flags.DEFINE_string("json", "", "also write the result to this file")

_FINE_TUNING = (_TRAIN, _DEV, _TEST)
_OPTIONS = {  # of each task
    "mlm": (_MASK_RATES,),
    "cloze": (_DATA,),
    "minimal_pairs": (_DATA, _VARIANT),
    "classification": (*_FINE_TUNING, _TEXT, _PAIR, _LABEL, _METRIC),
    "tagging": _FINE_TUNING,
    "retrieval": (*_FINE_TUNING, _TEXT, _PAIR, _LABEL, _SAVE),
}

flags.adopt_module_key_flags(cluster)


def main(config: Config) -> None:
    import jax

    from flax_mlm.inference.load import load_model
    from flax_mlm.storage import files

    for option in sorted({option.name for some in _OPTIONS.values() for option in some}):
        if flags.FLAGS[option].present and option not in [known.name for known in _OPTIONS[_TASK.value]]:
            raise UserError(f"--{option} is none of --task={_TASK.value}")
    gcs.refuse("--save", _SAVE.value)
    gcs.refuse("--json", _JSON.value)
    task = {
        "mlm": _mlm,
        "cloze": _cloze,
        "minimal_pairs": _minimal_pairs,
        "classification": _classification,
        "tagging": _tagging,
        "retrieval": _retrieval,
    }[_TASK.value]
    output = Path(_JSON.value).expanduser()
    identity = {"--checkpoint": _CHECKPOINT.value, "--task": _TASK.value, **flatten(config.to_dict())}
    with processes.join(cluster.from_flags(), identity, config.train.stall_timeout) as group:
        if _JSON.value and group.index == 0:
            files.check_writable("--json", output)
        with group.untimed("opening the checkpoint"):
            model = load_model(_CHECKPOINT.value, config)

        def poll() -> bool:
            group.progress("evaluating")
            return False

        with jax.set_mesh(model.mesh):
            result, table = task(model, group, poll)
        if group.index == 0:
            print("\n".join(table))
            if _JSON.value:
                about = {"task": _TASK.value, "objective": config.objective.name}
                files.write_json(output, about | result)


Answer = tuple[dict[str, Any], list[str]]  # result, and as lines


def _mlm(model: Any, group: Any, poll: Callable[[], bool]) -> Answer:
    from flax_mlm.data.open import open_corpus
    from flax_mlm.distributed.mesh import check_batch
    from flax_mlm.evaluation import mlm, rtd
    from flax_mlm.training.step import make_steps

    result: dict[str, Any]
    config, rates = model.config, _rates(_MASK_RATES.value)
    check_batch("eval.batch_size", config.eval.batch_size, model.mesh)
    with group.untimed("opening the corpus"):
        corpus = open_corpus(config)
    if corpus.tokenizer().fingerprint != model.tokenizer.fingerprint:
        raise UserError(f"data.corpus: {corpus} was made with another tokenizer than {_CHECKPOINT.value}")
    if model.meta and model.meta["corpus"] != corpus.fingerprint and not config.train.phases:
        print("note: this is not the corpus that the run has held rows out of; it may have seen these", file=sys.stderr)
    if corpus.seq_len != config.data.seq_len:  # of which the number of predicted slots is a share
        config = dataclasses.replace(config, data=dataclasses.replace(config.data, seq_len=corpus.seq_len))
        model = model._replace(config=config, steps=make_steps(config, model.tokenizer.vocab_size, model.mesh))
    about = {"corpus": corpus.fingerprint, "hidden": [*config.objective.masking_signature, config.eval.mask_rate]}
    if config.objective.name == "rtd":
        rows = rtd.measure(model, corpus, poll)
        each_row = {name: getattr(rows, name).tolist() for name in ("loss", "tokens", "replaced")}
        result = {**rtd.summary(rows, corpus), **about, "each_row": each_row}
        return result, rtd.table(result)
    measured = mlm.measure(model, corpus, poll)
    count_R, loss_R, *_ = measured.row_R4.T
    result = {
        **mlm.summary(measured, corpus),
        **about,
        "by": mlm.breakdown(measured, model.tokenizer.starts_word),
        "each_row": {"loss": loss_R.tolist(), "predicted_tokens": count_R.tolist()},
    }
    if config.objective.name == "mlm" and rates:
        result["rates"] = {}
        for rate in rates:
            changed = dataclasses.replace(config, eval=dataclasses.replace(config.eval, mask_rate=rate))
            steps = make_steps(changed, model.tokenizer.vocab_size, model.mesh)
            result["rates"][f"{rate:g}"] = mlm.run(model._replace(config=changed, steps=steps), corpus, poll)
    return result, mlm.table(result, config.objective.name)


def _rates(text: str) -> list[float]:
    try:
        rates = [float(part) for part in text.split(",") if part.strip()]
        if not all(0 < rate <= 1 for rate in rates):
            raise ValueError
    except ValueError:
        raise UserError(f"--mask_rates is '{text}'; it takes shares such as 0.15,0.3") from None
    return rates


def _cloze(model: Any, group: Any, poll: Callable[[], bool]) -> Answer:
    from flax_mlm.evaluation import cloze

    result = cloze.run(model, cloze.read(_DATA.value), poll)
    return result, cloze.table(result)


def _minimal_pairs(model: Any, group: Any, poll: Callable[[], bool]) -> Answer:
    from flax_mlm.evaluation import minimal_pairs

    if not _DATA.value:
        raise UserError("--data is missing; name a .jsonl file of pairs, or a folder of such")
    result = minimal_pairs.run(model, minimal_pairs.read(_DATA.value), _VARIANT.value, poll)
    return result, minimal_pairs.table(result)


def _classification(model: Any, group: Any, poll: Callable[[], bool]) -> Answer:
    from flax_mlm.evaluation import classification, report

    _check_fine_tuning(model, group)
    train, dev, test = (_labelled(flag.value) if flag.value else None for flag in (_TRAIN, _DEV, _TEST))
    if not train:
        raise UserError("--train is missing; name the file of labelled examples to fine-tune on")
    result = classification.run(model, train, dev, test, _METRIC.value, print, poll)
    return result, report.table(result)


def _tagging(model: Any, group: Any, poll: Callable[[], bool]) -> Answer:
    from flax_mlm.data import conll
    from flax_mlm.evaluation import report, tagging

    _check_fine_tuning(model, group)
    train, dev, test = (conll.read(flag.value) if flag.value else None for flag in (_TRAIN, _DEV, _TEST))
    if not train:
        raise UserError("--train is missing; name the file of tagged sentences to fine-tune on")
    result = tagging.run(model, train, dev, test, print, poll)
    return result, report.table(result)


def _retrieval(model: Any, group: Any, poll: Callable[[], bool]) -> Answer:
    from flax_mlm.evaluation import retrieval
    from flax_mlm.finetuning.save import save_encoder
    from flax_mlm.storage import files

    _check_fine_tuning(model, group)
    save = Path(_SAVE.value).expanduser()
    if not _TEST.value:
        raise UserError("--test is missing; name a BEIR folder, or a file of pairs of sentences with scores")
    if _SAVE.value:
        if save.exists():
            raise UserError(f"--save: '{save}' exists")
        if not _TRAIN.value:
            raise UserError("--save needs --train: there is nothing new")
        files.check_writable("--save", save, makes_folders=True)
    train, dev = (retrieval.read_pairs(flag.value, flag.name) if flag.value else None for flag in (_TRAIN, _DEV))
    is_folder = Path(_TEST.value).expanduser().is_dir()
    test = retrieval.read_benchmark(_TEST.value, "test") if is_folder else _labelled(_TEST.value)
    result, params = retrieval.run(model, train, dev, test, print, poll)
    if _SAVE.value:
        save_encoder(save, model, params["encoder"], result["examples"]["train"])
    return result, retrieval.table(result)


def _labelled(source: str) -> Any:
    from flax_mlm.data import tables as labelled

    return labelled.read(source, _TEXT.value, _PAIR.value, _LABEL.value)


def _check_fine_tuning(model: Any, group: Any) -> None:
    from flax_mlm.distributed.mesh import check_batch

    if group.count > 1:
        raise UserError(f"--task={_TASK.value} runs in one process, on all its devices; there are {group.count}")
    check_batch("finetune.batch_size", model.config.finetune.batch_size, model.mesh)


if __name__ == "__main__":
    command.run(main, from_checkpoint=True)
