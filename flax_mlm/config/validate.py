"""What a config's values may be, alone and together."""

import itertools
import math
from typing import Any

from flax_mlm.config.schema import LENGTHS, Config, OptimizerConfig, field_types, value_of
from flax_mlm.errors import UserError

CHOICES = {
    "data.packing": ("best_fit", "sequential"),
    "tokenizer.model_type": ("bpe", "unigram"),
    "tokenizer.normalization": ("nmt_nfkc", "nmt_nfkc_cf", "identity"),
    "model.position_embedding": ("learned", "rope"),
    "model.norm_position": ("post", "pre"),
    "model.attention": ("auto", "xla", "splash", "cudnn"),
    "model.dtype": ("float32", "bfloat16"),
    "model.remat": ("none", "dots", "full"),
    "objective.name": ("mlm", "clm", "rtd"),
    "objective.masking": ("token", "whole_word", "span"),
    "objective.embedding_sharing": ("none", "shared", "gradient_disentangled"),
    "finetune.method": ("full", "probe"),
    "finetune.pooling": ("cls", "mean", "last"),
    "optimizer.name": ("adamw", "stable_adamw", "schedule_free", "lamb", "muon"),
    "optimizer.schedule": ("linear", "cosine", "wsd", "constant"),
    "optimizer.spike_action": ("none", "clip", "skip"),
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
    "model.global_attn_every_n_layers": 1,
    "model.sliding_window": 2,
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
    "train.gradient_accumulation_steps": 1,
    "train.logits_chunks": 1,
    "train.batch_groups": 1,
    "train.log_every": 1,
    "train.eval_every": 0,
    "train.cloze_every": 0,
    "train.checkpoint_every": 1,
    "train.max_to_keep": 1,
    "train.keep_period": 0,
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
    "model.initializer_range": (0.0, 1.0, False, True),
    "model.rope_theta_global": (1.0, float("inf"), False, False),
    "model.rope_theta_local": (1.0, float("inf"), False, False),
    "objective.mask_rate": (0.0, 1.0, False, True),
    "objective.mask_replace_prob": (0.0, 1.0, True, True),
    "objective.random_replace_prob": (0.0, 1.0, True, True),
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
    """Raises UserError for a value that cannot work, or not together with another."""
    _check_values(c)
    c.data.folders()
    c.finetune.rates()
    c.finetune.sizes(c.model.hidden_size)
    _check_model(c)
    if c.model.attention in ("splash", "cudnn"):
        _check_kernel(c)
    _check_mesh(c)
    if c.objective.name == "rtd":
        _check_generator(c)
    _check_length(c)
    if c.train.reproducible:
        _check_reproducible(c)
    _check_optimizer(c)


def _check_values(c: Config) -> None:
    for path, (kind, _) in field_types().items():
        value = value_of(c, path)
        if kind is float and not math.isfinite(value):
            raise UserError(f"{path} is {value}; it must be a finite number")
        if kind is int and abs(value) >= 2**31:
            raise UserError(f"{path} is {value}; it must be less than 2**31")
    for path, choices in CHOICES.items():
        if value_of(c, path) not in choices:
            raise UserError(f"{path} is '{value_of(c, path)}'; it can be {', '.join(choices)}")
    for path, low in _AT_LEAST.items():
        if value_of(c, path) < low:
            raise UserError(f"{path} is {value_of(c, path)}; it must be at least {low}")
    for path, (low, high, low_ok, high_ok) in _BETWEEN.items():
        value = value_of(c, path)
        if not (low <= value <= high) or (value == low and not low_ok) or (value == high and not high_ok):
            bounds = f"{'[' if low_ok else '('}{low}, {high}{']' if high_ok else ')'}"
            raise UserError(f"{path} is {value}; it must lie in {bounds}")


def _need(ok: bool, message: str) -> None:
    if not ok:
        raise UserError(message)


def _need_with(cause: str, *rows: tuple[str, Any, bool, str]) -> None:
    for name, value, ok, what in rows:
        _need(ok, f"{name} is {value}; with {cause} it must be {what}")


def _check_model(c: Config) -> None:
    m = c.model
    _need(
        m.hidden_size % m.num_heads == 0,
        f"model.hidden_size is {m.hidden_size}; it must be divisible by model.num_heads, {m.num_heads}",
    )
    _need(
        m.position_embedding == "learned" or (m.hidden_size // m.num_heads) % 2 == 0,
        f"model.hidden_size / model.num_heads is {m.hidden_size // m.num_heads}; rope needs it even",
    )
    _need(
        not (m.share_layers and m.norm_position == "pre"),
        "model.share_layers is True; it needs model.norm_position = 'post', since pre-norm layers are not all alike",
    )
    _need(
        not c.reinit_head or bool(c.init_from),
        "reinit_head is True, but init_from is empty; it names the Hugging Face folder to start from",
    )
    _need(
        not c.tokenizer.extra_tokens_file or bool(c.tokenizer.path),
        "tokenizer.extra_tokens_file is set, but there is no tokenizer to extend; set tokenizer.path or init_from",
    )
    _need(
        c.data.seq_len <= m.max_positions,
        f"data.seq_len is {c.data.seq_len}, longer than model.max_positions, {m.max_positions}; raise the latter",
    )
    _need(
        c.objective.mask_replace_prob + c.objective.random_replace_prob <= 1.0,
        f"objective.mask_replace_prob + objective.random_replace_prob is "
        f"{c.objective.mask_replace_prob + c.objective.random_replace_prob:g}; it must be at most 1",
    )


def _check_kernel(c: Config) -> None:
    m, t = c.model, c.train
    tile = 2 if m.attention == "cudnn" else 128
    _need_with(
        f"model.attention = '{m.attention}'",
        ("data.seq_len", c.data.seq_len, c.data.seq_len % tile == 0, f"a multiple of {tile}"),
        ("model.dtype", m.dtype, m.attention != "cudnn" or m.dtype == "bfloat16", "bfloat16"),
        ("model.attention_dropout_rate", m.attention_dropout_rate, m.attention_dropout_rate == 0.0, "0"),
        ("train.reproducible", t.reproducible, not t.reproducible, "False"),
    )


def _check_mesh(c: Config) -> None:
    m, t = c.model, c.train
    _need(
        m.num_heads % c.mesh.tensor == 0,
        f"mesh.tensor is {c.mesh.tensor}; it must divide model.num_heads, {m.num_heads}",
    )
    _need(
        m.intermediate_size % c.mesh.tensor == 0,
        f"mesh.tensor is {c.mesh.tensor}; it must divide model.intermediate_size, {m.intermediate_size}",
    )
    _need(
        m.vocab_multiple_of % c.mesh.tensor == 0,
        f"mesh.tensor is {c.mesh.tensor}; it must divide model.vocab_multiple_of, {m.vocab_multiple_of} (128 will do)",
    )
    _need(
        m.hidden_size % c.mesh.fsdp == 0,
        f"mesh.fsdp is {c.mesh.fsdp}; it must divide model.hidden_size, {m.hidden_size}",
    )
    _need(
        c.mesh.data == -1 or c.mesh.data >= 1,
        f"mesh.data is {c.mesh.data}; it must be at least 1, or -1 for all devices left",
    )
    _need(
        t.global_batch_size % t.gradient_accumulation_steps == 0,
        f"train.global_batch_size is {t.global_batch_size}; it must be divisible by train.gradient_accumulation_steps, "
        f"{t.gradient_accumulation_steps}",
    )


def _check_length(c: Config) -> None:
    t = c.train
    lengths = [f"train.{name}" for name in LENGTHS if getattr(t, name)]
    _need(len(lengths) < 2, f"{' and '.join(lengths)} are set; a run has one length")
    for name, other in itertools.permutations(("budget_cost", "price_per_chip_hour")):
        _need(
            not getattr(t, name) or getattr(t, other) > 0,
            f"train.{name} is {getattr(t, name):g}; it needs train.{other}, too",
        )


def _check_reproducible(c: Config) -> None:
    m, t = c.model, c.train
    _need_with(
        "train.reproducible",
        ("model.scan_layers", m.scan_layers, m.scan_layers is not False, "True, else roundings differ"),
        ("model.remat", m.remat, m.remat == "none", "none, else roundings differ"),
        ("train.logits_chunks", t.logits_chunks, t.logits_chunks == 1, "1, else roundings differ"),
    )
    _need(
        t.gradient_accumulation_steps == 1,
        f"train.gradient_accumulation_steps is {t.gradient_accumulation_steps}; with train.reproducible the batch is "
        f"taken in train.batch_groups parts already, and it must be 1",
    )
    _need(c.mesh.tensor == 1, f"mesh.tensor is {c.mesh.tensor}; train.reproducible needs it to be 1")
    for name, rows in (("train.global_batch_size", t.global_batch_size), ("eval.batch_size", c.eval.batch_size)):
        _need(
            rows % t.batch_groups == 0,
            f"{name} is {rows}; with train.reproducible it must be divisible by train.batch_groups, {t.batch_groups}",
        )


def check_snapshots(o: OptimizerConfig, steps: int) -> None:
    """Raises UserError: so many steps do not make as many snapshots of the weights as are to be averaged."""
    _need(
        o.averaging != "lawa" or (o.lawa_count - 1) * o.lawa_every < steps,
        f"optimizer.lawa_count is {o.lawa_count}; a run of {steps} steps has not as many snapshots, "
        f"{o.lawa_every} steps apart (optimizer.lawa_every)",
    )


def _check_optimizer(c: Config) -> None:
    o, t = c.optimizer, c.train
    if t.unit == "steps":
        check_snapshots(o, t.steps)
    if t.has_budget:
        for name, wrong in (
            ("name = 'schedule_free'", o.name == "schedule_free"),
            ("averaging = 'lawa'", o.averaging == "lawa"),
        ):
            _need(not wrong, f"train.{t.unit} is set; optimizer.{name} has to know the number of steps beforehand")
    if o.name == "schedule_free":
        _need_with(
            "optimizer.name = 'schedule_free'",
            ("optimizer.schedule", o.schedule, o.schedule == "constant", "constant"),
            ("optimizer.averaging", o.averaging, o.averaging == "none", "none, since it averages by itself"),
            ("optimizer.beta1", o.beta1, o.beta1 > 0.0, "above 0"),
        )
    _need(
        o.schedule != "wsd" or o.warmup_fraction + o.decay_fraction <= 1.0,
        f"optimizer.warmup_fraction + optimizer.decay_fraction is {o.warmup_fraction + o.decay_fraction:g}; it must be "
        f"at most 1",
    )


def _check_generator(c: Config) -> None:
    m, g, size, tensor = c.model, c.generator, c.objective.generator_size, c.mesh.tensor
    _need(not c.init_from, "init_from is set; objective.name = 'rtd' begins anew, for no folder holds both its models")
    _need(
        c.train.cloze_every == 0, f"train.cloze_every is {c.train.cloze_every}; an encoder trained with rtd fills none"
    )
    _need(
        c.train.logits_chunks == 1,
        f"train.logits_chunks is {c.train.logits_chunks}; with rtd, which samples from the generator's logits, it must "
        "be 1",
    )
    _need(
        m.embedding_size != m.hidden_size,
        f"model.embedding_size is {m.embedding_size}, as model.hidden_size is; with rtd write 0 for that",
    )
    _need(
        g.num_heads >= 1 and abs(m.num_heads * size - g.num_heads) < 0.05,
        f"objective.generator_size is {size:g}; of model.num_heads, {m.num_heads}, it must leave a whole number, as "
        f"{max(1, g.num_heads) / m.num_heads:.4g} does",
    )
    for name, value in (("heads", g.num_heads), ("MLP width", g.intermediate_size)):
        _need(
            value % tensor == 0,
            f"mesh.tensor is {tensor}; it must divide the generator's {name}, {value} (objective.generator_size "
            f"{size:g})",
        )
    _need(
        g.hidden_size % c.mesh.fsdp == 0,
        f"mesh.fsdp is {c.mesh.fsdp}; it must divide the generator's width, {g.hidden_size} (objective.generator_size "
        f"{size:g})",
    )
