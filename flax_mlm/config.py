"""ConfigDict at the edge, validated frozen dataclasses inside.

`configs/base.py` declares every knob with its default; the dataclasses here give each its type, and
`build` checks what can be checked before anything heavy is imported.
"""

import dataclasses
import difflib
import itertools
import math
import os
import re
import runpy
import typing
from collections.abc import Callable
from pathlib import Path
from typing import Any

from ml_collections import ConfigDict
from ml_collections.config_dict import placeholder

from flax_mlm.errors import UserError

LENGTHS = ("tokens", "budget_minutes", "budget_chip_hours", "budget_cost")  # of a run, where it is not in steps

BASE = Path(__file__).parent.parent / "configs" / "base.py"


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
          UserError: a weight is no positive number, some have none, or a folder is named twice.
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
    extend: str
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
    positions: str
    norm_position: str
    norm_eps: float
    use_bias: bool
    glu: bool
    type_vocab_size: int
    embedding_size: int
    share_layers: bool
    global_attention_every: int
    local_window: int
    attention: str
    rope_theta_global: float
    rope_theta_local: float
    dropout_rate: float
    attention_dropout_rate: float
    init_stddev: float
    vocab_multiple_of: int
    dtype: str
    scan_layers: bool | None
    remat: str


@dataclasses.dataclass(frozen=True)
class ObjectiveConfig:
    name: str
    masking: str
    mask_rate: float
    replace_mask: float
    replace_random: float
    span_stop: float
    span_max_words: int
    z_loss: float
    generator_size: float
    generator_depth: float
    embedding_sharing: str
    discriminator_weight: float


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
    microbatches: int
    loss_chunks: int
    reproducible: bool
    batch_groups: int
    log_every: int
    eval_every: int
    cloze_every: int
    checkpoint_every: int
    keep_last: int
    keep_every: int
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
    dimensions: str

    def sizes(self, hidden_size: int) -> list[int]:
        """How many dimensions of a vector are trained to do alone, all of them last. Raises UserError."""
        try:
            sizes = [int(part) for part in self.dimensions.split(",") if part.strip()]
            if not all(0 < size < hidden_size for size in sizes):
                raise ValueError
        except ValueError:
            raise UserError(
                f"finetune.dimensions is '{self.dimensions}'; it takes numbers below model.hidden_size, {hidden_size}"
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
    """A whole run. Built by `build`, so every instance has passed `check`."""

    seed: int
    init_from: str
    init_new_head: bool
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
    check(config)

    from flax_mlm import phases  # which are made of configs

    phases.of(config)
    return config


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


_CHOICES = {
    "data.packing": ("best_fit", "sequential"),
    "tokenizer.model_type": ("bpe", "unigram"),
    "tokenizer.normalization": ("nmt_nfkc", "nmt_nfkc_cf", "identity"),
    "model.positions": ("learned", "rope"),
    "model.norm_position": ("post", "pre"),
    "model.attention": ("auto", "plain", "splash", "cudnn", "interpreted"),
    "model.dtype": ("float32", "bfloat16"),
    "model.remat": ("none", "dots", "full"),
    "objective.name": ("mlm", "clm", "rtd"),
    "objective.masking": ("token", "whole_word", "span"),
    "objective.embedding_sharing": ("none", "shared", "gradient_disentangled"),
    "finetune.method": ("full", "probe"),
    "finetune.pooling": ("cls", "mean", "last"),
    "optimizer.name": ("adamw", "stable_adamw", "schedule_free", "lamb", "muon"),
    "optimizer.schedule": ("linear", "cosine", "wsd", "constant"),
    "optimizer.spike_action": ("none", "clip", "skip", "rewind"),
    "optimizer.averaging": ("none", "ema", "lawa"),
}
_AT_LEAST = {
    "seed": 0,
    "data.seq_len": 4,
    "data.validation_every": 2,
    "data.num_workers": 0,
    "tokenizer.vocab_size": 1,
    "tokenizer.sample_bytes": 1,
    "model.num_layers": 1,
    "model.hidden_size": 1,
    "model.num_heads": 1,
    "model.intermediate_size": 1,
    "model.max_positions": 1,
    "model.type_vocab_size": 0,
    "model.embedding_size": 0,
    "model.global_attention_every": 1,
    "model.local_window": 2,
    "model.vocab_multiple_of": 1,
    "objective.span_max_words": 1,
    "objective.z_loss": 0.0,
    "optimizer.weight_decay": 0.0,
    "optimizer.max_grad_norm": 0.0,
    "optimizer.max_skipped_steps": 1,
    "optimizer.lawa_every": 1,
    "optimizer.lawa_count": 1,
    "train.steps": 1,
    "train.tokens": 0.0,
    "train.budget_minutes": 0.0,
    "train.budget_chip_hours": 0.0,
    "train.budget_cost": 0.0,
    "train.price_per_chip_hour": 0.0,
    "train.global_batch_size": 1,
    "train.microbatches": 1,
    "train.loss_chunks": 1,
    "train.batch_groups": 1,
    "train.log_every": 1,
    "train.eval_every": 0,
    "train.cloze_every": 0,
    "train.checkpoint_every": 1,
    "train.keep_last": 1,
    "train.keep_every": 0,
    "train.max_failed_saves": 1,
    "train.stall_timeout": 0.0,
    "eval.batch_size": 1,
    "eval.max_rows": 0,
    "finetune.epochs": 1,
    "finetune.patience": 1,
    "finetune.batch_size": 1,
    "finetune.seeds": 1,
    "finetune.max_length": 4,
    "finetune.weight_decay": 0.0,
    "finetune.hard_negatives": 0,
    "mesh.fsdp": 1,
    "mesh.tensor": 1,
}
# (low, high, low itself allowed, high itself allowed)
_BETWEEN = {
    "tokenizer.character_coverage": (0.0, 1.0, False, True),
    "model.dropout_rate": (0.0, 1.0, True, False),
    "model.attention_dropout_rate": (0.0, 1.0, True, False),
    "model.norm_eps": (0.0, 1.0, False, False),
    "model.init_stddev": (0.0, 1.0, False, True),
    "model.rope_theta_global": (1.0, float("inf"), False, False),
    "model.rope_theta_local": (1.0, float("inf"), False, False),
    "objective.mask_rate": (0.0, 1.0, False, True),
    "objective.replace_mask": (0.0, 1.0, True, True),
    "objective.replace_random": (0.0, 1.0, True, True),
    "objective.span_stop": (0.0, 1.0, False, True),
    "objective.generator_size": (0.0, 1.0, False, True),
    "objective.generator_depth": (0.0, 1.0, False, True),
    "objective.discriminator_weight": (0.0, float("inf"), False, False),
    "optimizer.learning_rate": (0.0, float("inf"), False, False),
    "optimizer.warmup_fraction": (0.0, 1.0, True, True),
    "optimizer.decay_fraction": (0.0, 1.0, True, True),
    "optimizer.final_lr_fraction": (0.0, 1.0, True, True),
    "optimizer.beta1": (0.0, 1.0, True, False),
    "optimizer.beta2": (0.0, 1.0, True, False),
    "optimizer.eps": (0.0, 1.0, False, False),
    "optimizer.spike_threshold": (0.0, float("inf"), False, False),
    "optimizer.ema_decay": (0.0, 1.0, False, False),
    "eval.mask_rate": (0.0, 1.0, False, True),
    "finetune.dropout_rate": (0.0, 1.0, True, False),
    "finetune.warmup_fraction": (0.0, 1.0, True, True),
    "finetune.temperature": (0.0, float("inf"), False, False),
}


def check(c: Config) -> None:
    """Raises UserError for a value that cannot work."""

    def value_of(path: str) -> Any:
        node: Any = c
        for name in path.split("."):
            node = getattr(node, name)
        return node

    for path, (kind, _) in field_types().items():
        value = value_of(path)
        if kind is float and value is not None and not math.isfinite(value):
            raise UserError(f"{path} is {value}; it must be a finite number")
        if kind is int and value is not None and abs(value) >= 2**31:
            raise UserError(f"{path} is {value}; it must be less than 2**31")
    for path, choices in _CHOICES.items():
        if value_of(path) not in choices:
            raise UserError(f"{path} is '{value_of(path)}'; it can be {', '.join(choices)}")
    for path, low in _AT_LEAST.items():
        if value_of(path) < low:
            raise UserError(f"{path} is {value_of(path)}; it must be at least {low}")
    for path, (low, high, low_ok, high_ok) in _BETWEEN.items():
        value = value_of(path)
        if value is None:
            continue
        if not (low <= value <= high) or (value == low and not low_ok) or (value == high and not high_ok):
            bounds = f"{'[' if low_ok else '('}{low}, {high}{']' if high_ok else ')'}"
            raise UserError(f"{path} is {value}; it must lie in {bounds}")

    def need(ok: bool, message: str) -> None:
        if not ok:
            raise UserError(message)

    c.data.folders()
    c.finetune.rates()
    c.finetune.sizes(c.model.hidden_size)
    m, t = c.model, c.train
    if m.attention in ("splash", "cudnn", "interpreted"):
        tile = 2 if m.attention == "cudnn" else 128
        for name, value, ok, what in (
            ("data.seq_len", c.data.seq_len, c.data.seq_len % tile == 0, f"a multiple of {tile}"),
            ("model.dtype", m.dtype, m.attention != "cudnn" or m.dtype == "bfloat16", "bfloat16"),
            ("model.attention_dropout_rate", m.attention_dropout_rate, m.attention_dropout_rate == 0.0, "0"),
            ("train.reproducible", t.reproducible, not t.reproducible, "False"),
        ):
            need(ok, f"{name} is {value}; with model.attention = '{m.attention}' it must be {what}")
    need(
        m.hidden_size % m.num_heads == 0,
        f"model.hidden_size is {m.hidden_size}; it must be divisible by model.num_heads, {m.num_heads}",
    )
    need(
        m.positions == "learned" or (m.hidden_size // m.num_heads) % 2 == 0,
        f"model.hidden_size / model.num_heads is {m.hidden_size // m.num_heads}; rope needs it even",
    )
    need(
        not (m.share_layers and m.norm_position == "pre"),
        "model.share_layers is True; it needs model.norm_position = 'post', since pre-norm layers are not all alike",
    )
    need(
        not c.init_new_head or bool(c.init_from),
        "init_new_head is True, but init_from is empty; it names the Hugging Face folder to start from",
    )
    need(
        not c.tokenizer.extend or bool(c.tokenizer.path),
        "tokenizer.extend is set, but there is no tokenizer to extend; set tokenizer.path or init_from",
    )
    need(
        c.data.seq_len <= m.max_positions,
        f"data.seq_len is {c.data.seq_len}, longer than model.max_positions, {m.max_positions}; raise the latter",
    )
    need(
        m.num_heads % c.mesh.tensor == 0,
        f"mesh.tensor is {c.mesh.tensor}; it must divide model.num_heads, {m.num_heads}",
    )
    need(
        m.intermediate_size % c.mesh.tensor == 0,
        f"mesh.tensor is {c.mesh.tensor}; it must divide model.intermediate_size, {m.intermediate_size}",
    )
    need(
        m.vocab_multiple_of % c.mesh.tensor == 0,
        f"mesh.tensor is {c.mesh.tensor}; it must divide model.vocab_multiple_of, {m.vocab_multiple_of} (128 will do)",
    )
    need(
        m.hidden_size % c.mesh.fsdp == 0,
        f"mesh.fsdp is {c.mesh.fsdp}; it must divide model.hidden_size, {m.hidden_size}",
    )
    if c.objective.name == "rtd":
        _check_generator(c, need)
    lengths = [f"train.{name}" for name in LENGTHS if getattr(t, name)]
    need(len(lengths) < 2, f"{' and '.join(lengths)} are set; a run has one length")
    for name, other in itertools.permutations(("budget_cost", "price_per_chip_hour")):
        need(
            not getattr(t, name) or getattr(t, other) > 0,
            f"train.{name} is {getattr(t, name):g}; it needs train.{other}, too",
        )
    if t.has_budget:
        for name, wrong in (
            ("name = 'schedule_free'", c.optimizer.name == "schedule_free"),
            ("averaging = 'lawa'", c.optimizer.averaging == "lawa"),
        ):
            need(not wrong, f"train.{t.unit} is set; optimizer.{name} has to know the number of steps beforehand")
    need(
        c.mesh.data == -1 or c.mesh.data >= 1,
        f"mesh.data is {c.mesh.data}; it must be at least 1, or -1 for all devices left",
    )
    need(
        t.global_batch_size % t.microbatches == 0,
        f"train.global_batch_size is {t.global_batch_size}; it must be divisible by train.microbatches, "
        f"{t.microbatches}",
    )
    if t.reproducible:
        need(
            t.microbatches == 1,
            f"train.microbatches is {t.microbatches}; with train.reproducible the batch is taken in "
            f"train.batch_groups parts already, and it must be 1",
        )
        need(c.mesh.tensor == 1, f"mesh.tensor is {c.mesh.tensor}; train.reproducible needs it to be 1")
        for name, rows in (("train.global_batch_size", t.global_batch_size), ("eval.batch_size", c.eval.batch_size)):
            need(
                rows % t.batch_groups == 0,
                f"{name} is {rows}; with train.reproducible it must be divisible by train.batch_groups, "
                f"{t.batch_groups}",
            )
    need(
        c.objective.replace_mask + c.objective.replace_random <= 1.0,
        f"objective.replace_mask + objective.replace_random is "
        f"{c.objective.replace_mask + c.objective.replace_random:g}; it must be at most 1",
    )
    if c.optimizer.name == "schedule_free":
        for name, value, ok, what in (
            ("schedule", c.optimizer.schedule, c.optimizer.schedule == "constant", "constant"),
            ("averaging", c.optimizer.averaging, c.optimizer.averaging == "none", "none, since it averages by itself"),
            ("beta1", c.optimizer.beta1, c.optimizer.beta1 > 0.0, "above 0"),
        ):
            need(ok, f"optimizer.{name} is {value}; with optimizer.name = 'schedule_free' it must be {what}")
    need(
        c.optimizer.schedule != "wsd" or c.optimizer.warmup_fraction + c.optimizer.decay_fraction <= 1.0,
        f"optimizer.warmup_fraction + optimizer.decay_fraction is "
        f"{c.optimizer.warmup_fraction + c.optimizer.decay_fraction:g}; it must be at most 1",
    )


def _check_generator(c: Config, need: Callable[[bool, str], None]) -> None:
    m, g, size, tensor = c.model, c.generator, c.objective.generator_size, c.mesh.tensor
    need(not c.init_from, "init_from is set; objective.name = 'rtd' begins anew, for no folder holds both its models")
    need(
        c.train.cloze_every == 0, f"train.cloze_every is {c.train.cloze_every}; an encoder trained with rtd fills none"
    )
    need(
        c.train.loss_chunks == 1,
        f"train.loss_chunks is {c.train.loss_chunks}; with rtd, which draws from the generator's scores, it must be 1",
    )
    need(
        m.embedding_size != m.hidden_size,
        f"model.embedding_size is {m.embedding_size}, as model.hidden_size is; with rtd write 0 for that",
    )
    need(
        g.num_heads >= 1 and abs(m.num_heads * size - g.num_heads) < 0.05,
        f"objective.generator_size is {size:g}; of model.num_heads, {m.num_heads}, it must leave a whole number, as "
        f"{max(1, g.num_heads) / m.num_heads:.4g} does",
    )
    for name, value in (("heads", g.num_heads), ("MLP width", g.intermediate_size)):
        need(
            value % tensor == 0,
            f"mesh.tensor is {tensor}; it must divide the generator's {name}, {value} (objective.generator_size "
            f"{size:g})",
        )
    need(
        g.hidden_size % c.mesh.fsdp == 0,
        f"mesh.fsdp is {c.mesh.fsdp}; it must divide the generator's width, {g.hidden_size} (objective.generator_size "
        f"{size:g})",
    )
