"""The config as frozen dataclasses: each field with its type, its allowed values, and whether phases change it.

`configs/base.py` gives each field its default and explains it. A text in an annotation is an interval of numbers, such
as `[0, 1)`, which contains 0 but not 1, or lists choices, such as `a | b`. Rules across fields are in `validate.py`.
"""

import contextlib
import math
import os
import re
from collections.abc import Callable, Iterable
from dataclasses import asdict, dataclass, replace
from typing import Annotated, Any

from flax_mlm.errors import UserError

CHANGEABLE = "phases of a run may change it"
INTERPOLATED = "phases may change it, also by `a->b`"
FROM_FOLDER = "may be None until `inference.config.apply_folder` fills it"


@dataclass(frozen=True)
class DataConfig:
    source: str
    encoding: str
    dedup: Annotated[str, "none | exact | near"]
    dedup_threshold: Annotated[float, "(0, 1]"]
    decontaminate: str
    corpus: Annotated[str, CHANGEABLE]
    sampling_alpha: Annotated[float, "(0, 1]", CHANGEABLE]
    cache_dir: str
    seq_len: Annotated[int, "[4, inf)", CHANGEABLE, FROM_FOLDER]
    validation_fraction: Annotated[float, "(0, 1)"]
    packing: Annotated[str, "best_fit | sequential"]
    num_workers: Annotated[int, "[0, inf)"]

    def folders(self, exists: Callable[[str], bool] | None = None) -> dict[str, str]:
        """Corpora of `corpus`: folder or gs:// path -> weight as written, "" for all of them if none has a weight.

        Args:
          exists: says whether there is a folder of this name, which may have commas and colons in it; None: one on
            this machine.

        Raises:
          UserError: a weight is not a positive number, only some corpora have one, a folder is named twice, or weights
            stand beside a `sampling_alpha`.
        """

        def wrong(why: str) -> UserError:
            return UserError(f"data.corpus: {why}; expected a folder, or several such as 'wiki:0.7,books:0.3'")

        is_folder = exists or (lambda path: os.path.isdir(os.path.expanduser(path)))

        def parts(item: str) -> tuple[str, str]:
            pattern = r"^(.*?)(?::([+-]?(?:[\d.]+(?:e[+-]?\d+)?|nan|inf)))?$"
            return (item, "") if is_folder(item) else re.findall(pattern, item, re.I | re.S)[0]

        weights: dict[str, str] = {}
        for item in split_paths(self.corpus, lambda item: is_folder(parts(item)[0])) if self.corpus else []:
            path, weight = parts(item)
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
        if self.sampling_alpha != 1.0 and any(weights.values()):
            what = f"data.sampling_alpha is {self.sampling_alpha:g}, and data.corpus has weights ('{self.corpus}')"
            raise UserError(f"{what}; expected one of the two; leave out the weights, or set data.sampling_alpha=1")
        return weights


@dataclass(frozen=True)
class TokenizerConfig:
    path: str
    extra_tokens_file: str
    model_type: Annotated[str, "bpe | unigram | symbols"]
    vocab_size: Annotated[int, "[1, inf)"]
    normalization: Annotated[str, "nmt_nfkc | nmt_nfkc_cf | identity"]
    character_coverage: Annotated[float, "(0, 1]"]
    sample_bytes: Annotated[int, "[1, inf)"]


@dataclass(frozen=True)
class ModelConfig:
    num_layers: Annotated[int, "[1, inf)"]
    hidden_size: Annotated[int, "[1, inf)"]
    num_heads: Annotated[int, "[1, inf)"]
    intermediate_size: Annotated[int, "[1, inf)"]
    max_positions: Annotated[int, "[1, inf)"]
    position_embedding: Annotated[str, "learned | rope"]
    norm_position: Annotated[str, "post | pre"]
    norm_eps: Annotated[float, "(0, 1)"]
    use_bias: bool
    glu: bool
    activation: Annotated[str, "gelu | gelu_tanh"]
    type_vocab_size: Annotated[int, "[0, inf)"]
    embedding_size: Annotated[int, "[0, inf)"]
    share_layers: bool
    global_attn_every_n_layers: Annotated[int, "[1, inf)"]
    sliding_window: Annotated[int, "[2, inf)", CHANGEABLE]
    attention: Annotated[str, "auto | xla | splash | cudnn", CHANGEABLE]
    rope_theta_global: Annotated[float, "(1, inf)", CHANGEABLE]
    rope_theta_local: Annotated[float, "(1, inf)", CHANGEABLE]
    dropout_rate: Annotated[float, "[0, 1)", CHANGEABLE]
    attention_dropout_rate: Annotated[float, "[0, 1)", CHANGEABLE]
    initializer_range: Annotated[float, "(0, 1]"]
    vocab_multiple_of: Annotated[int, "[1, inf)"]
    dtype: Annotated[str, "float32 | bfloat16"]
    scan_layers: bool | None
    remat: Annotated[str, "none | dots | full", CHANGEABLE]


@dataclass(frozen=True)
class ObjectiveConfig:
    name: Annotated[str, "mlm | clm | rtd", CHANGEABLE]
    masking: Annotated[str, "token | whole_word | span", CHANGEABLE]
    mask_rate: Annotated[float, "(0, 1]", INTERPOLATED]
    mask_replace_prob: Annotated[float, "[0, 1]", INTERPOLATED]
    random_replace_prob: Annotated[float, "[0, 1]", INTERPOLATED]
    span_stop: Annotated[float, "(0, 1]", CHANGEABLE]
    span_max_words: Annotated[int, "[1, inf)", CHANGEABLE]
    attend_across_documents: Annotated[bool, CHANGEABLE]
    z_loss: Annotated[float, "[0, inf)", CHANGEABLE]
    generator_size: Annotated[float, "(0, 1]", CHANGEABLE]
    generator_depth: Annotated[float, "(0, 1]", CHANGEABLE]
    embedding_sharing: Annotated[str, "none | shared | gradient_disentangled", CHANGEABLE]
    discriminator_weight: Annotated[float, "(0, inf)", CHANGEABLE]

    @property
    def masking_signature(self) -> list[Any]:
        """How tokens are masked; held-out losses with different signatures cannot be compared."""
        if self.name == "clm":
            return []
        spans = [self.span_stop, self.span_max_words] if self.masking == "span" else []
        return [self.masking, self.mask_replace_prob, self.random_replace_prob, *spans]


@dataclass(frozen=True)
class OptimizerConfig:
    name: Annotated[str, "adamw | stable_adamw | schedule_free | lamb | muon"]
    learning_rate: Annotated[float, "(0, inf)", INTERPOLATED, FROM_FOLDER]
    schedule: Annotated[str, "linear | cosine | wsd | constant"]
    warmup_fraction: Annotated[float, "[0, 1]", CHANGEABLE]
    warmup_steps: Annotated[int, "[0, inf)", CHANGEABLE]
    head_first_steps: Annotated[int, "[0, inf)", FROM_FOLDER]
    head_rate_factor: Annotated[float, "(0, inf)", FROM_FOLDER]
    decay_fraction: Annotated[float, "[0, 1]"]
    final_lr_fraction: Annotated[float, "[0, 1]"]
    beta1: Annotated[float, "[0, 1)"]
    beta2: Annotated[float, "[0, 1)"]
    eps: Annotated[float, "(0, 1)"]
    weight_decay: Annotated[float, "[0, inf)", INTERPOLATED]
    max_grad_norm: Annotated[float, "[0, inf)"]
    max_skipped_steps: Annotated[int, "[1, inf)"]
    spike_action: Annotated[str, "none | clip | skip"]
    spike_threshold: Annotated[float, "(0, inf)"]
    averaging: Annotated[str, "none | ema | lawa"]
    ema_decay: Annotated[float, "(0, 1)"]
    lawa_every: Annotated[int, "[1, inf)"]
    lawa_count: Annotated[int, "[1, inf)"]

    @property
    def averages(self) -> str:
        """The average of the weights that training keeps: ema, lawa, schedule_free or none."""
        return self.name if self.name == "schedule_free" else self.averaging


LENGTHS = ("tokens", "budget_minutes")  # fields that replace train.steps as the length of a run


@dataclass(frozen=True)
class TrainConfig:
    steps: Annotated[int, "[1, inf)"]
    tokens: Annotated[float, "[0, inf)"]
    budget_minutes: Annotated[float, "[0, inf)"]
    phases: str
    global_batch_size: Annotated[int, "[1, inf)", CHANGEABLE]
    gradient_accumulation_steps: Annotated[int, "[1, inf)", CHANGEABLE]
    logits_chunks: Annotated[int, "[1, inf)"]
    reproducible: bool
    batch_groups: Annotated[int, "[1, inf)"]
    log_every: Annotated[int, "[1, inf)"]
    eval_every: Annotated[int, "[0, inf)"]
    cloze_every: Annotated[int, "[0, inf)"]
    checkpoint_every: Annotated[int, "[1, inf)"]
    max_to_keep: Annotated[int, "[1, inf)"]
    keep_period: Annotated[int, "[0, inf)"]
    max_failed_saves: Annotated[int, "[1, inf)"]
    stall_timeout: Annotated[float, "[0, inf)"]

    @property
    def unit(self) -> str:
        """The unit of the run's length: steps, tokens or budget_minutes."""
        return next((name for name in LENGTHS if getattr(self, name)), "steps")

    @property
    def length(self) -> float:
        """The run's length in `unit`."""
        return getattr(self, self.unit)


@dataclass(frozen=True)
class EvalConfig:
    batch_size: Annotated[int, "[1, inf)"]
    max_rows: Annotated[int, "[0, inf)"]
    mask_rate: Annotated[float, "(0, 1]"]


@dataclass(frozen=True)
class FinetuneConfig:
    method: Annotated[str, "full | probe"]
    pooling: Annotated[str, "cls | mean | last"]
    head: Annotated[str, "auto | linear"]
    class_weights: str
    learning_rates: str
    epochs: Annotated[int, "[1, inf)"]
    patience: Annotated[int, "[1, inf)"]
    batch_size: Annotated[int, "[1, inf)"]
    seeds: Annotated[int, "[1, inf)"]
    max_length: Annotated[int, "[4, inf)"]
    prompt: str
    dropout_rate: Annotated[float, "[0, 1)"]
    warmup_fraction: Annotated[float, "[0, 1]"]
    weight_decay: Annotated[float, "[0, inf)"]
    temperature: Annotated[float, "(0, inf)"]
    hard_negatives: Annotated[int, "[0, inf)"]
    matryoshka_dims: str

    def sizes(self, hidden_size: int) -> list[int]:
        """The numbers of leading dimensions that Matryoshka training uses, `hidden_size` last. Raises UserError."""
        items = filter(None, split(self.matryoshka_dims, ","))
        expected = f"numbers below model.hidden_size, {hidden_size}, such as 32,64"
        return [*self._numbers("matryoshka_dims", int, items, hidden_size, expected), hidden_size]

    def rates(self, hidden_size: int) -> list[float]:
        """The learning rates to try; small encoders need higher ones. Raises UserError."""
        rates = self.learning_rates or ("2e-5,5e-5,1e-4" if hidden_size >= 512 else "1e-4,3e-4,1e-3")
        return self._numbers("learning_rates", float, split(rates, ","), 1, "numbers such as 2e-5,5e-5")

    def _numbers(self, name: str, kind: type, items: Iterable[str], end: int, expected: str) -> list[Any]:
        """Converts the items of a field to numbers between 0 and `end`."""
        with contextlib.suppress(ValueError):
            numbers = [kind(item) for item in items]
            if all(0 < number < end for number in numbers):
                return numbers
        raise UserError(f"finetune.{name} is '{getattr(self, name)}'; expected {expected}")


@dataclass(frozen=True)
class MeshConfig:
    data: int
    fsdp: Annotated[int, "[1, inf)"]
    tensor: Annotated[int, "[1, inf)"]


@dataclass(frozen=True)
class LogConfig:
    tensorboard: bool
    wandb_project: str


@dataclass(frozen=True)
class Config:
    """The config of a run. `load.build` checks each one that it builds."""

    seed: Annotated[int, "[0, inf)"]
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


def split_paths(text: str, exists: Callable[[str], bool]) -> list[str]:
    """Splits a list of paths at its commas, but for those in the name of a path that exists as it is written."""
    if exists(text):
        return [text]
    items, paths = split(text, ","), list[str]()
    while items:
        longest = (n for n in range(len(items), 1, -1) if exists(",".join(items[:n])))
        paths.append(",".join(items[: (n := next(longest, 1))]))
        items = items[n:]
    return paths


def split(text: str, separator: str) -> list[str]:
    """Splits a list at its one-character separator, and strips the parts.

    `train.phases`, `data.corpus`, `--grid` and `--tasks` are lists separated by `;`, `,` or `&`. A separator inside
    double quotes is ordinary text, and so is a quote that is never closed.
    """
    parts = [""]
    for token in re.findall(rf'"[^"]*"|"|{separator}|[^"{separator}]+', text):
        if token == separator:
            parts.append("")
        else:
            parts[-1] += token
    return [part.strip() for part in parts]
