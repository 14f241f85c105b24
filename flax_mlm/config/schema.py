"""The config as frozen dataclasses: each field with its type and, as metadata, the values that it may have.

`configs/base.py` gives each field its default and explains it. Rules across fields are in `validate.py`.
"""

import math
import os
import re
from dataclasses import asdict, dataclass, field, replace
from typing import Any

from flax_mlm.config.allowed import (
    CHANGEABLE,
    INTERPOLATED,
    OPEN_FRACTION,
    POSITIVE,
    POSITIVE_FRACTION,
    PROBABILITY,
    RATE,
    at_least,
    one_of,
    within,
)
from flax_mlm.config.grammar import split
from flax_mlm.errors import UserError


@dataclass(frozen=True)
class DataConfig:
    source: str
    corpus: str = field(metadata=CHANGEABLE)
    cache_dir: str
    seq_len: int = field(metadata=at_least(4) | CHANGEABLE)
    validation_fraction: float = field(metadata=OPEN_FRACTION)
    packing: str = field(metadata=one_of("best_fit", "sequential"))
    num_workers: int = field(metadata=at_least(0))

    def folders(self) -> dict[str, str]:
        """Corpora of `corpus`: folder or gs:// path -> weight as written, "" for all of them if none has a weight.

        Raises:
          UserError: a weight is not a positive number, only some corpora have one, or a folder is named twice.
        """

        def wrong(why: str) -> UserError:
            return UserError(f"data.corpus: {why}; expected a folder, or several such as 'wiki:0.7,books:0.3'")

        if not self.corpus or os.path.isdir(os.path.expanduser(self.corpus)):  # a folder may have any name
            return dict.fromkeys(filter(None, [self.corpus]), "")
        weights: dict[str, str] = {}
        for item in split(self.corpus, ","):
            path, weight = re.findall(r"^(.*?)(?::([+-]?(?:[\d.]+(?:e[+-]?\d+)?|nan|inf)))?$", item, re.I | re.S)[0]
            if not path:
                raise wrong(f"'{self.corpus}' has an empty item")
            if path in weights:
                raise wrong(f"'{path}' is named twice")
            try:
                if weight and not 0 < float(weight) < math.inf:
                    raise ValueError
            except ValueError:
                raise wrong(f"the weight of '{path}' is {weight}, not a positive number") from None
            weights[path] = weight
        if "" in weights.values() and any(weights.values()):
            path = next(path for path, weight in weights.items() if not weight)
            raise wrong(f"'{path}' has no weight, but others have")
        return weights


@dataclass(frozen=True)
class TokenizerConfig:
    path: str
    extra_tokens_file: str
    model_type: str = field(metadata=one_of("bpe", "unigram"))
    vocab_size: int = field(metadata=at_least(1))
    normalization: str = field(metadata=one_of("nmt_nfkc", "nmt_nfkc_cf", "identity"))
    character_coverage: float = field(metadata=POSITIVE_FRACTION)
    sample_bytes: int = field(metadata=at_least(1))


@dataclass(frozen=True)
class ModelConfig:
    num_layers: int = field(metadata=at_least(1))
    hidden_size: int = field(metadata=at_least(1))
    num_heads: int = field(metadata=at_least(1))
    intermediate_size: int = field(metadata=at_least(1))
    max_positions: int = field(metadata=at_least(1))
    position_embedding: str = field(metadata=one_of("learned", "rope"))
    norm_position: str = field(metadata=one_of("post", "pre"))
    norm_eps: float = field(metadata=OPEN_FRACTION)
    use_bias: bool
    glu: bool
    type_vocab_size: int = field(metadata=at_least(0))
    embedding_size: int = field(metadata=at_least(0))
    share_layers: bool
    global_attn_every_n_layers: int = field(metadata=at_least(1))
    sliding_window: int = field(metadata=at_least(2) | CHANGEABLE)
    attention: str = field(metadata=one_of("auto", "xla", "splash", "cudnn") | CHANGEABLE)
    rope_theta_global: float = field(metadata=within("(1, inf)") | CHANGEABLE)
    rope_theta_local: float = field(metadata=within("(1, inf)") | CHANGEABLE)
    dropout_rate: float = field(metadata=RATE | CHANGEABLE)
    attention_dropout_rate: float = field(metadata=RATE | CHANGEABLE)
    initializer_range: float = field(metadata=POSITIVE_FRACTION)
    vocab_multiple_of: int = field(metadata=at_least(1))
    dtype: str = field(metadata=one_of("float32", "bfloat16"))
    scan_layers: bool | None
    remat: str = field(metadata=one_of("none", "dots", "full") | CHANGEABLE)


@dataclass(frozen=True)
class ObjectiveConfig:
    name: str = field(metadata=one_of("mlm", "clm", "rtd") | CHANGEABLE)
    masking: str = field(metadata=one_of("token", "whole_word", "span") | CHANGEABLE)
    mask_rate: float = field(metadata=POSITIVE_FRACTION | INTERPOLATED)
    mask_replace_prob: float = field(metadata=PROBABILITY | INTERPOLATED)
    random_replace_prob: float = field(metadata=PROBABILITY | INTERPOLATED)
    span_stop: float = field(metadata=POSITIVE_FRACTION | CHANGEABLE)
    span_max_words: int = field(metadata=at_least(1) | CHANGEABLE)
    attend_across_documents: bool = field(metadata=CHANGEABLE)
    z_loss: float = field(metadata=at_least(0) | CHANGEABLE)
    generator_size: float = field(metadata=POSITIVE_FRACTION | CHANGEABLE)
    generator_depth: float = field(metadata=POSITIVE_FRACTION | CHANGEABLE)
    embedding_sharing: str = field(metadata=one_of("none", "shared", "gradient_disentangled") | CHANGEABLE)
    discriminator_weight: float = field(metadata=POSITIVE | CHANGEABLE)

    @property
    def masking_signature(self) -> list[Any]:
        """How tokens are masked; held-out losses with different signatures cannot be compared."""
        if self.name == "clm":
            return []
        spans = [self.span_stop, self.span_max_words] if self.masking == "span" else []
        return [self.masking, self.mask_replace_prob, self.random_replace_prob, *spans]


@dataclass(frozen=True)
class OptimizerConfig:
    name: str = field(metadata=one_of("adamw", "stable_adamw", "schedule_free", "lamb", "muon"))
    learning_rate: float = field(metadata=POSITIVE | INTERPOLATED)
    schedule: str = field(metadata=one_of("linear", "cosine", "wsd", "constant"))
    warmup_fraction: float = field(metadata=PROBABILITY)
    decay_fraction: float = field(metadata=PROBABILITY)
    final_lr_fraction: float = field(metadata=PROBABILITY)
    beta1: float = field(metadata=RATE)
    beta2: float = field(metadata=RATE)
    eps: float = field(metadata=OPEN_FRACTION)
    weight_decay: float = field(metadata=at_least(0) | INTERPOLATED)
    max_grad_norm: float = field(metadata=at_least(0))
    max_skipped_steps: int = field(metadata=at_least(1))
    spike_action: str = field(metadata=one_of("none", "clip", "skip"))
    spike_threshold: float = field(metadata=POSITIVE)
    averaging: str = field(metadata=one_of("none", "ema", "lawa"))
    ema_decay: float = field(metadata=OPEN_FRACTION)
    lawa_every: int = field(metadata=at_least(1))
    lawa_count: int = field(metadata=at_least(1))

    @property
    def averages(self) -> str:
        """The average of the weights that training keeps: ema, lawa, schedule_free or none."""
        return self.name if self.name == "schedule_free" else self.averaging


LENGTHS = ("tokens", "budget_minutes")  # fields that replace train.steps as the length of a run


@dataclass(frozen=True)
class TrainConfig:
    steps: int = field(metadata=at_least(1))
    tokens: float = field(metadata=at_least(0))
    budget_minutes: float = field(metadata=at_least(0))
    phases: str
    global_batch_size: int = field(metadata=at_least(1) | CHANGEABLE)
    gradient_accumulation_steps: int = field(metadata=at_least(1) | CHANGEABLE)
    logits_chunks: int = field(metadata=at_least(1))
    reproducible: bool
    batch_groups: int = field(metadata=at_least(1))
    log_every: int = field(metadata=at_least(1))
    eval_every: int = field(metadata=at_least(0))
    cloze_every: int = field(metadata=at_least(0))
    checkpoint_every: int = field(metadata=at_least(1))
    max_to_keep: int = field(metadata=at_least(1))
    keep_period: int = field(metadata=at_least(0))
    max_failed_saves: int = field(metadata=at_least(1))
    stall_timeout: float = field(metadata=at_least(0))

    @property
    def unit(self) -> str:
        """The unit of the run's length: steps, tokens or budget_minutes."""
        return next((name for name in LENGTHS if getattr(self, name)), "steps")

    @property
    def length(self) -> float:
        """The run's length in `unit`."""
        return getattr(self, self.unit)

    @property
    def has_budget(self) -> bool:
        """True if the run ends when its time is used up."""
        return self.budget_minutes > 0


@dataclass(frozen=True)
class EvalConfig:
    batch_size: int = field(metadata=at_least(1))
    max_rows: int = field(metadata=at_least(0))
    mask_rate: float = field(metadata=POSITIVE_FRACTION)


@dataclass(frozen=True)
class FinetuneConfig:
    method: str = field(metadata=one_of("full", "probe"))
    pooling: str = field(metadata=one_of("cls", "mean", "last"))
    learning_rates: str
    epochs: int = field(metadata=at_least(1))
    patience: int = field(metadata=at_least(1))
    batch_size: int = field(metadata=at_least(1))
    seeds: int = field(metadata=at_least(1))
    max_length: int = field(metadata=at_least(4))
    dropout_rate: float = field(metadata=RATE)
    warmup_fraction: float = field(metadata=PROBABILITY)
    weight_decay: float = field(metadata=at_least(0))
    temperature: float = field(metadata=POSITIVE)
    hard_negatives: int = field(metadata=at_least(0))
    matryoshka_dims: str

    def sizes(self, hidden_size: int) -> list[int]:
        """The numbers of leading dimensions that Matryoshka training uses, `hidden_size` last. Raises UserError."""
        try:
            sizes = [int(item) for item in split(self.matryoshka_dims, ",") if item]
            if not all(0 < size < hidden_size for size in sizes):
                raise ValueError
        except ValueError:
            raise UserError(
                f"finetune.matryoshka_dims is '{self.matryoshka_dims}'; expected numbers below model.hidden_size, "
                f"{hidden_size}, such as 32,64"
            ) from None
        return [*sizes, hidden_size]

    def rates(self) -> list[float]:
        """The learning rates to try. Raises UserError."""
        try:
            rates = [float(item) for item in split(self.learning_rates, ",")]
            if not all(0 < rate < 1 for rate in rates):
                raise ValueError
        except ValueError:
            raise UserError(
                f"finetune.learning_rates is '{self.learning_rates}'; expected numbers such as 2e-5,5e-5"
            ) from None
        return rates


@dataclass(frozen=True)
class MeshConfig:
    data: int
    fsdp: int = field(metadata=at_least(1))
    tensor: int = field(metadata=at_least(1))


@dataclass(frozen=True)
class LogConfig:
    tensorboard: bool
    wandb_project: str


@dataclass(frozen=True)
class Config:
    """The config of a run. `load.build` checks each one that it builds."""

    seed: int = field(metadata=at_least(0))
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
        """The shape of the generator of `rtd`: fewer heads of the encoder's head width, and embeddings of the encoder's
        width that are projected to its own."""
        m, o = self.model, self.objective
        heads = round(m.num_heads * o.generator_size)
        hidden_size = heads * (m.hidden_size // m.num_heads)
        embedding_size = m.embedding_size or m.hidden_size
        return replace(
            m,
            num_layers=max(1, round(m.num_layers * o.generator_depth)),
            num_heads=heads,
            hidden_size=hidden_size,
            intermediate_size=round(m.intermediate_size * heads / m.num_heads),
            embedding_size=embedding_size if embedding_size != hidden_size else 0,
        )

    def to_dict(self) -> dict[str, Any]:
        """Plain nested dict, ready for JSON."""
        return asdict(self)
