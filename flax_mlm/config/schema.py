"""ConfigDict at the edge, validated frozen dataclasses inside.

`configs/base.py` declares every knob with its default; the dataclasses here give each its type, and
`build` checks what can be checked before anything heavy is imported.
"""

import dataclasses
import difflib
import functools
import math
import os
import re
import runpy
import typing
from pathlib import Path
from typing import Any

from ml_collections import ConfigDict
from ml_collections.config_dict import placeholder

from flax_mlm.errors import UserError

LENGTHS = ("tokens", "budget_minutes", "budget_chip_hours", "budget_cost")  # of a run, where it is not in steps

BASE = Path(__file__).parent.parent.parent / "configs" / "base.py"


@dataclasses.dataclass(frozen=True)
class DataConfig:
    source: str
    corpus: str
    cache_dir: str
    seq_len: int
    validation_every: int
    packing: str
    num_workers: int

    def folders(self) -> dict[str, str]:
        """Folder (or path in a bucket) -> weight as it was written, of each that `corpus` names; "" where it has none.

        Raises:
          UserError: a weight is not a positive number, some have none, or a folder is named twice.
        """

        def wrong(why: str) -> UserError:
            return UserError(f"data.corpus: {why}; it takes a folder, or several such as 'wiki:0.7,books:0.3'")

        if not self.corpus or os.path.isdir(os.path.expanduser(self.corpus)):  # with whatever name
            return dict.fromkeys(filter(None, [self.corpus]), "")
        found: dict[str, str] = {}
        for part in self.corpus.split(","):
            match = re.fullmatch(r"(.*?)(?::([+-]?(?:[\d.]+(?:e[+-]?\d+)?|nan|inf)))?", part.strip(), re.I | re.S)
            assert match
            path, weight = match[1], match[2] or ""
            if not path:
                raise wrong(f"'{self.corpus}' has an empty part")
            if path in found:
                raise wrong(f"'{path}' is named twice")
            try:
                if weight and not 0 < float(weight) < math.inf:
                    raise ValueError
            except ValueError:
                raise wrong(f"the weight of '{path}' is {weight}, not a positive number") from None
            found[path] = weight
        if "" in found.values() and any(found.values()):
            path = next(path for path, weight in found.items() if not weight)
            raise wrong(f"'{path}' has no weight, but others have")
        return found


@dataclasses.dataclass(frozen=True)
class TokenizerConfig:
    path: str
    extra_tokens_file: str
    model_type: str
    vocab_size: int
    normalization: str
    character_coverage: float
    sample_bytes: int


@dataclasses.dataclass(frozen=True)
class ModelConfig:
    num_layers: int
    hidden_size: int
    num_heads: int
    intermediate_size: int
    max_positions: int
    position_embedding: str
    norm_position: str
    norm_eps: float
    use_bias: bool
    glu: bool
    type_vocab_size: int
    embedding_size: int
    share_layers: bool
    global_attn_every_n_layers: int
    sliding_window: int
    attention: str
    rope_theta_global: float
    rope_theta_local: float
    dropout_rate: float
    attention_dropout_rate: float
    initializer_range: float
    vocab_multiple_of: int
    dtype: str
    scan_layers: bool | None
    remat: str


@dataclasses.dataclass(frozen=True)
class ObjectiveConfig:
    name: str
    masking: str
    mask_rate: float
    mask_replace_prob: float
    random_replace_prob: float
    span_stop: float
    span_max_words: int
    attend_across_documents: bool
    z_loss: float
    generator_size: float
    generator_depth: float
    embedding_sharing: str
    discriminator_weight: float

    @property
    def masking_signature(self) -> list[Any]:
        """How tokens are hidden; held-out losses of tokens that are hidden otherwise do not compare."""
        if self.name == "clm":
            return []
        spans = [self.span_stop, self.span_max_words] if self.masking == "span" else []
        return [self.masking, self.mask_replace_prob, self.random_replace_prob, *spans]


@dataclasses.dataclass(frozen=True)
class OptimizerConfig:
    name: str
    learning_rate: float
    schedule: str
    warmup_fraction: float
    decay_fraction: float
    final_lr_fraction: float
    beta1: float
    beta2: float
    eps: float
    weight_decay: float
    max_grad_norm: float
    max_skipped_steps: int
    spike_action: str
    spike_threshold: float
    averaging: str
    ema_decay: float
    lawa_every: int
    lawa_count: int

    @property
    def averages(self) -> str:
        """Which average of the weights is kept beside them: ema, lawa, schedule_free or none."""
        return self.name if self.name == "schedule_free" else self.averaging


@dataclasses.dataclass(frozen=True)
class TrainConfig:
    steps: int
    tokens: float
    budget_minutes: float
    budget_chip_hours: float
    budget_cost: float
    price_per_chip_hour: float
    phases: str
    global_batch_size: int
    gradient_accumulation_steps: int
    logits_chunks: int
    reproducible: bool
    batch_groups: int
    log_every: int
    eval_every: int
    cloze_every: int
    checkpoint_every: int
    max_to_keep: int
    keep_period: int
    max_failed_saves: int
    stall_timeout: float

    @property
    def unit(self) -> str:
        """What the length of the run is given in: steps, tokens, budget_minutes, budget_chip_hours or budget_cost."""
        return next((name for name in LENGTHS if getattr(self, name)), "steps")

    @property
    def length(self) -> float:
        """So many of them."""
        return getattr(self, self.unit)

    @property
    def has_budget(self) -> bool:
        """Whether the clock says when the run ends."""
        return self.unit not in ("steps", "tokens")

    def seconds(self, chips: int) -> float:
        """The time that a budget is on so many chips."""
        if self.budget_minutes:
            return 60 * self.budget_minutes
        return 3600 * (self.budget_chip_hours or self.budget_cost / self.price_per_chip_hour) / chips


@dataclasses.dataclass(frozen=True)
class EvalConfig:
    batch_size: int
    max_rows: int
    mask_rate: float


@dataclasses.dataclass(frozen=True)
class FinetuneConfig:
    method: str
    pooling: str
    learning_rates: str
    epochs: int
    patience: int
    batch_size: int
    seeds: int
    max_length: int
    dropout_rate: float
    warmup_fraction: float
    weight_decay: float
    temperature: float
    hard_negatives: int
    matryoshka_dims: str

    def sizes(self, hidden_size: int) -> list[int]:
        """How many dimensions of a vector are trained to do alone, all of them last. Raises UserError."""
        try:
            sizes = [int(part) for part in self.matryoshka_dims.split(",") if part.strip()]
            if not all(0 < size < hidden_size for size in sizes):
                raise ValueError
        except ValueError:
            raise UserError(
                f"finetune.matryoshka_dims is '{self.matryoshka_dims}'; it takes numbers below model.hidden_size, "
                f"{hidden_size}"
            ) from None
        return [*sizes, hidden_size]

    def rates(self) -> list[float]:
        """The learning rates to try. Raises UserError."""
        try:
            rates = [float(part) for part in self.learning_rates.split(",")]
            if not all(0 < rate < 1 for rate in rates):
                raise ValueError
        except ValueError:
            raise UserError(
                f"finetune.learning_rates is '{self.learning_rates}'; it takes numbers such as 2e-5,5e-5"
            ) from None
        return rates


@dataclasses.dataclass(frozen=True)
class MeshConfig:
    data: int
    fsdp: int
    tensor: int


@dataclasses.dataclass(frozen=True)
class LogConfig:
    tensorboard: bool
    wandb_project: str


@dataclasses.dataclass(frozen=True)
class Config:
    """A whole run. Built by `build`, so every instance has passed `validate.check`."""

    seed: int
    init_from: str
    reinit_head: bool
    data: DataConfig
    tokenizer: TokenizerConfig
    model: ModelConfig
    objective: ObjectiveConfig
    optimizer: OptimizerConfig
    train: TrainConfig
    eval: EvalConfig
    finetune: FinetuneConfig
    mesh: MeshConfig
    log: LogConfig

    @property
    def generator(self) -> ModelConfig:
        """The shape of the generator of `rtd`. Its heads are as wide as the encoder's, there are only fewer; its
        embeddings are as wide too, whether shared or not, and are projected to its width."""
        m, o = self.model, self.objective
        heads = round(m.num_heads * o.generator_size)
        width, embeddings = heads * (m.hidden_size // m.num_heads), m.embedding_size or m.hidden_size
        return dataclasses.replace(
            m,
            num_layers=max(1, round(m.num_layers * o.generator_depth)),
            num_heads=heads,
            hidden_size=width,
            intermediate_size=round(m.intermediate_size * heads / m.num_heads),
            embedding_size=embeddings if embeddings != width else 0,
        )

    def to_dict(self) -> dict[str, Any]:
        """Plain nested dict, ready for JSON."""
        return dataclasses.asdict(self)


def flatten(tree: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    """Nested dicts as one, with dotted names."""
    flat: dict[str, Any] = {}
    for name, value in tree.items():
        flat |= flatten(value, f"{prefix}{name}.") if isinstance(value, dict) else {prefix + name: value}
    return flat


def build(config_dict: ConfigDict) -> Config:
    """Turns a resolved ConfigDict into a checked `Config`.

    Raises:
      UserError: a field is missing, unknown, or holds a value that cannot work.
    """
    values = config_dict.to_dict()
    sections = {}
    for field in dataclasses.fields(Config):
        if field.name not in values:
            raise UserError(f"config has no '{field.name}'; start from configs/base.py")
        value = values.pop(field.name)
        if dataclasses.is_dataclass(field.type):
            names = {f.name for f in dataclasses.fields(field.type)}
            for wrong, verb in ((names - value.keys(), "lacks"), (value.keys() - names, "has an unknown field")):
                if wrong:
                    raise UserError(f"config section '{field.name}' {verb} '{min(wrong)}'; see configs/base.py")
            value = typing.cast(Any, field.type)(**value)
        sections[field.name] = value
    if values:
        raise UserError(f"config has an unknown section '{min(values)}'; see configs/base.py")
    config = Config(**sections)

    from flax_mlm.config import phases, validate  # which are made of configs

    validate.check(config)
    phases.parse_phases(config)
    return config


def value_of(config: Config, path: str) -> Any:
    """A field's value, by its dotted name."""
    return functools.reduce(getattr, path.split("."), config)


def field_types() -> dict[str, tuple[type, bool]]:
    """Type of every field by its dotted name, and whether it may be None."""
    result: dict[str, tuple[type, bool]] = {}
    for section in dataclasses.fields(Config):
        if dataclasses.is_dataclass(section.type):
            for field in dataclasses.fields(section.type):
                options = typing.get_args(field.type) or (field.type,)
                result[f"{section.name}.{field.name}"] = (options[0], type(None) in options)
        else:
            result[section.name] = (section.type, False)  # type: ignore[assignment]
    return result


def field_type(path: str) -> tuple[type, bool]:
    """As `field_types`, of one field. Raises UserError, with the nearest name, where there is no such field."""
    fields = field_types()
    if path not in fields:
        near = difflib.get_close_matches(path, fields, n=1, cutoff=0.5)
        near = near or [f for f in fields if f.endswith("." + path.rsplit(".", 1)[-1])]
        hint = f"did you mean '{near[0]}'?" if near else "--print_config lists them all"
        raise UserError(f"config has no field '{path}'; {hint}")
    return fields[path]


def from_dict(values: dict[str, Any]) -> ConfigDict:
    """The ConfigDict of a config that was stored as JSON (the inverse of `Config.to_dict`). One that was stored before
    a field existed has that field's default."""
    stored = dict(values)
    for name, default in runpy.run_path(str(BASE))["get_config"]().to_dict().items():
        value = stored.get(name, default)
        stored[name] = default | value if isinstance(default, dict) else value
    config = ConfigDict(stored)
    for path, (kind, optional) in field_types().items():
        section, _, name = path.rpartition(".")
        if optional and section in config and config[section].get(name) is None:
            config[section][name] = placeholder(kind)
    return config


def parse(kind: type, path: str, text: str) -> Any:
    """A field's value from what the user wrote; also `1_000_000` and `1e6` for a whole number.

    Raises:
      UserError: it is none of this type.
    """
    try:
        if kind is bool:
            return {"true": True, "yes": True, "1": True, "false": False, "no": False, "0": False}[text.lower()]
        if kind is float:
            return float(text)
        if kind is int:
            try:
                return int(text)
            except ValueError:
                if not float(text).is_integer():
                    raise
                return int(float(text))
    except (ValueError, KeyError, OverflowError):
        wanted = {bool: "true or false", float: "a number", int: "a whole number"}[kind]
        raise UserError(f"--config.{path} is '{text}'; it takes {wanted}") from None
    return text
