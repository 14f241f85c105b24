"""Description of an architecture of `transformers`, and checks of its config.json.

An architecture is two functions between its config.json and the fields of `ModelConfig`, and a table of weights that
serves reading and writing.
"""

import dataclasses
import enum
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

from flax_mlm.config.schema import ModelConfig

HfConfig = Mapping[str, Any]  # the content of a config.json


class SpecialIds(NamedTuple):
    """The token ids that a config.json names."""

    pad_id: int
    cls_id: int
    sep_id: int


class Layout(enum.Enum):
    """Layout of a tensor of transformers, compared with our parameter."""

    SAME = enum.auto()
    LINEAR = enum.auto()  # kernels are (outputs, inputs), not (inputs, outputs), and may be split along the outputs
    OFFSET = enum.auto()  # begins with unused rows, as many as the padding id plus 1


class WeightRule(NamedTuple):
    """One row of a weight table: a module or array of ours, and its names in transformers."""

    param: str  # path of our module, or of an array that belongs to no module
    names: tuple[str, ...]  # one, or several that we concatenate; `{}` stands for the index of a layer
    layout: Layout


def weight(param: str, *names: str, layout: Layout = Layout.SAME) -> WeightRule:
    """Makes one row of a weight table."""
    return WeightRule(param, names, layout)


def linear(param: str, *names: str) -> WeightRule:
    """Makes one row of a weight table for a linear map."""
    return WeightRule(param, names, Layout.LINEAR)


def vocab_head(dense: str, norm: str, bias: str) -> tuple[WeightRule, ...]:
    """Makes the rows of a weight table for a `VocabularyHead`."""
    return linear("head/dense", dense), weight("head/norm", norm), weight("head/decoder_bias", bias)


@dataclasses.dataclass(frozen=True)
class Architecture:
    """One architecture of transformers, with the head of one objective.

    Attributes:
      model_type: its value in config.json and of --architecture.
      class_name: its class in transformers.
      objective: mlm, clm or rtd.
      from_hf_config: config.json -> the fields of `ModelConfig` that it determines. Raises ValueError where our encoder
        cannot compute the model.
      to_hf_config: the inverse: `ModelConfig` and token ids -> keys of config.json.
      weights: the weight table.
      tied: name of a weight -> name of the weight that it must equal.
      unused: beginnings of the names of weights that our model lacks: poolers, heads of other tasks.
    """

    model_type: str
    class_name: str
    objective: str
    from_hf_config: Callable[[HfConfig], dict[str, Any]]
    to_hf_config: Callable[[ModelConfig, SpecialIds], dict[str, Any]]
    weights: tuple[WeightRule, ...]
    tied: Mapping[str, str]
    unused: tuple[str, ...]

    @property
    def prefix(self) -> str:
        """The beginning of the encoder's weight names, such as `bert.`; a model without head leaves it out."""
        return self.weights[0].names[0].partition(".")[0] + "."

    @property
    def has_offset(self) -> bool:
        """Returns whether the first position has the row after that of the padding id, as in RoBERTa."""
        return any(rule.layout is Layout.OFFSET for rule in self.weights)


Names = Mapping[str, str]
SIZES: Names = {  # field of ModelConfig -> key of config.json, in all architectures but DistilBERT
    "num_layers": "num_hidden_layers",
    "hidden_size": "hidden_size",
    "num_heads": "num_attention_heads",
    "intermediate_size": "intermediate_size",
    "max_positions": "max_position_embeddings",
}


def sizes_from_hf(config: HfConfig, names: Names = SIZES) -> dict[str, Any]:
    """Returns the fields of `ModelConfig` that all architectures have. Raises ValueError where one is not positive."""
    return {field: number(config, key) for field, key in names.items()}


def sizes_to_hf(model: ModelConfig, ids: SpecialIds, names: Names = SIZES) -> dict[str, Any]:
    """Returns the keys of config.json that all architectures have."""
    return {
        **{key: getattr(model, field) for field, key in names.items()},
        "initializer_range": model.initializer_range,
        "tie_word_embeddings": True,
        "pad_token_id": ids.pad_id,
        "bos_token_id": ids.cls_id,
        "eos_token_id": ids.sep_id,
    }


def number(config: HfConfig, key: str, kind: type = int, default: Any = None) -> Any:
    """Returns a positive number, int or float, of a config.json. Raises ValueError where the value is none."""
    value = config.get(key, default)
    if type(value) not in (int, kind) or value <= 0:
        raise ValueError(f"{key} = {value!r}; expected a positive number")
    return kind(value)


def expect(config: HfConfig, **values: Any) -> None:
    """Raises ValueError where a config.json has one of the keys with another value."""
    for key, value in values.items():
        if config.get(key, value) != value:
            raise ValueError(f"{key} = {config[key]!r}; expected {value!r}")


_ACTIVATIONS = {  # in transformers -> model.activation
    **dict.fromkeys(("gelu", "gelu_python"), "gelu"),
    **dict.fromkeys(("gelu_new", "gelu_pytorch_tanh", "gelu_python_tanh", "gelu_fast", "gelu_accurate"), "gelu_tanh"),
}


def activation_from_hf(config: HfConfig, key: str) -> str:
    """Returns `model.activation`. Raises ValueError where our encoder lacks the activation."""
    name = config.get(key, "gelu")
    if not isinstance(name, str) or name not in _ACTIVATIONS:
        raise ValueError(f"{key} = {name!r}; expected one of {', '.join(_ACTIVATIONS)}")
    return _ACTIVATIONS[name]


def activation_to_hf(model: ModelConfig) -> str:
    """Returns the activation's name in transformers."""
    return "gelu_new" if model.activation == "gelu_tanh" else "gelu"


def position_offset(config: HfConfig) -> int:
    """Returns the number of unused rows at the beginning of a RoBERTa's position embedding."""
    pad_id = config.get("pad_token_id")
    return (1 if pad_id is None else pad_id) + 1
