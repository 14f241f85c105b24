"""A task's head on an encoder: what it predicts, and its outputs for rows of tokens."""

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import jax
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from flax_mlm.config.schema import ModelConfig
from flax_mlm.errors import UserError
from flax_mlm.model.heads import TASK_HEADS, init_task_head
from flax_mlm.objectives.rows import new_key

DEFAULT_METRICS = {  # of each kind of problem; the first three are values of transformers' problem_type
    "single_label_classification": "accuracy",
    "multi_label_classification": "f1_micro",
    "regression": "spearman",
    "token_classification": "f1",
}


class TaskHead(NamedTuple):
    """A head with what is needed to use it. Pooling and length of texts are those of `config.finetune`."""

    task: str  # classification or tagging
    problem: str  # of `DEFAULT_METRICS`
    labels: tuple[str, ...]  # in the order of the outputs; empty for a regression
    kind: str = "linear"  # of `heads.TASK_HEADS`
    pairs: bool | None = None  # trained on pairs of texts; None: not known
    metric: str = ""  # by which it was chosen; empty: not known
    params: Any = None

    @property
    def num_outputs(self) -> int:
        """Counts the outputs."""
        return max(len(self.labels), 1)

    @property
    def per_token(self) -> bool:
        """Returns whether every token has outputs of its own."""
        return self.problem == "token_classification"

    def about(self) -> dict[str, Any]:
        """Describes the head as JSON, without its parameters."""
        entries = {"task": self.task, "problem_type": self.problem, "labels": list(self.labels), "head": self.kind}
        return {**entries, "pairs": self.pairs, "metric": self.metric}

    def abstract_params(self, config: ModelConfig, mesh: Mesh) -> Any:
        """Returns shapes and dtypes of the parameters, whole on every device."""
        shapes = jax.eval_shape(lambda: init_task_head(new_key(0), config, self.num_outputs, self.kind))
        whole = NamedSharding(mesh, PartitionSpec())
        return jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=whole), shapes)


def from_about(about: Mapping[str, Any]) -> TaskHead | None:
    """Returns the head that `TaskHead.about` describes; None where there is none, as of an encoder for search.

    Raises:
      UserError: another version has written it.
    """
    if "problem_type" not in about:
        return None
    for name, known in (("problem_type", DEFAULT_METRICS), ("head", TASK_HEADS)):
        if about[name] not in known:
            raise UserError(f"--checkpoint: its head has {name} '{about[name]}'; expected one of {', '.join(known)}")
    labels = tuple(about["labels"])
    return TaskHead(about["task"], about["problem_type"], labels, about["head"], about["pairs"], about["metric"])


def require(head: TaskHead | None, task: str) -> TaskHead:
    """Returns the head of a model. Raises UserError: it has none for the task."""
    if head is None or head.task != task:
        own = f"a head for {head.task}, and none for --task={task}" if head else "no head"
        what = f"--train is missing, and the checkpoint has {own}"
        raise UserError(f"{what}; give --train, or the folder of evaluate --task={task} --save")
    return head


def check_pairs(head: TaskHead, pairs: Sequence[str] | None, flag: str) -> None:
    """Raises UserError where texts are single and the head was trained on pairs, or the other way round."""
    if head.pairs is not None and head.pairs != (pairs is not None):
        seen, expected = ("two texts", "one") if pairs is not None else ("one text", "two")
        raise UserError(f"--{flag} has {seen} a line; expected {expected}, as the head was trained on; see --pair")
