"""Checks a config: each value against what its field allows, and the rules across fields."""

import codecs
import math
import re
from typing import Any

from flax_mlm.config.knobs import Interval, knobs, value_of
from flax_mlm.config.schema import LENGTHS, Config, OptimizerConfig
from flax_mlm.errors import UserError


def check(c: Config) -> None:
    """Raises UserError if a value is not allowed, or not together with another."""
    _check_values(c)
    c.data.folders()
    _check_encoding(c.data.encoding)
    c.finetune.rates(c.model.hidden_size)
    c.finetune.sizes(c.model.hidden_size)
    _check_start(c)
    _check_model(c)
    _check_attention(c)
    _check_mesh(c)
    if c.objective.name == "rtd":
        _check_generator(c)
    if c.train.reproducible:
        _check_reproducible(c)
    _check_training(c)


def _check_values(c: Config) -> None:
    for path, knob in knobs().items():
        value = value_of(c, path)
        if value is None:
            _need(knob.optional, f"{path} is none; expected a value")
            continue
        if knob.type is float and not math.isfinite(value):
            raise UserError(f"{path} is {value}; expected a finite number")
        if knob.type is int and abs(value) >= 2**31:
            raise UserError(f"{path} is {value}; expected less than 2**31")
        if isinstance(knob.allowed, Interval) and value not in knob.allowed:
            raise UserError(f"{path} is {value}; expected a number {knob.allowed}")
        if isinstance(knob.allowed, tuple) and value not in knob.allowed:
            raise UserError(f"{path} is '{value}'; expected one of {', '.join(knob.allowed)}")


def _check_encoding(name: str) -> None:
    try:
        decoder = codecs.getincrementaldecoder(name)
        is_text = decoder().decode(b"") == "" and decoder("replace").decode(b"text") != ""  # as files are decoded
    except (LookupError, TypeError, ValueError):
        is_text = False
    if not is_text and re.fullmatch(r"utf[-_ ]?(16|32)", name.strip().lower()):
        what = f"data.encoding is '{name}', for which a file needs a byte-order mark, and then no data.encoding"
        raise UserError(f"{what}; expected the encoding of files without one, such as {name}-le")
    if not is_text:
        raise UserError(f"data.encoding is '{name}'; expected an encoding of Python, such as latin1 or gb18030")


def check_complete(c: Config) -> None:
    """Raises UserError if a field is still none that a Hugging Face folder would give."""
    head = "optimizer.head_first_steps", "optimizer.head_rate_factor"
    for path in ("optimizer.learning_rate", "data.seq_len", *head):
        from_folder = "a number, or init_from=DIR, a Hugging Face folder that determines it"
        _need(value_of(c, path) is not None, f"{path} is none; expected {from_folder}")


def _need(ok: bool, message: str) -> None:
    if not ok:
        raise UserError(message)


def _need_value(c: Config, path: str, ok: bool, expected: str) -> None:
    _need(ok, f"{path} is {value_of(c, path)}; expected {expected}")


def _need_equal(c: Config, why: str, **expected: Any) -> None:
    """Checks fields, written as section__name."""
    for name, value in expected.items():
        path = name.replace("__", ".")
        _need_value(c, path, value_of(c, path) == value, f"{value} {why}")


def _need_divisible(c: Config, path: str, by: str, hint: str = "") -> None:
    divisor = value_of(c, by)
    _need_value(c, path, value_of(c, path) % divisor == 0, f"a number divisible by {by}, {divisor}{hint}")


def _need_at_most_1(c: Config, *paths: str) -> None:
    total = sum(value_of(c, path) for path in paths)
    _need(total <= 1.0, f"{' + '.join(paths)} is {total:g}; expected at most 1")


def _check_start(c: Config) -> None:
    message = "reinit_head is True, but init_from is empty; set init_from to the Hugging Face folder to start from"
    _need(not c.reinit_head or bool(c.init_from), message)
    message = "tokenizer.extra_tokens_file is set, but there is no tokenizer to extend; set tokenizer.path or init_from"
    _need(not c.tokenizer.extra_tokens_file or bool(c.tokenizer.path), message)


def _check_model(c: Config) -> None:
    m = c.model
    _need_divisible(c, "model.hidden_size", by="model.num_heads")
    head_width = m.hidden_size // m.num_heads
    message = f"model.hidden_size / model.num_heads is {head_width}; rope needs an even number"
    _need(m.position_embedding == "learned" or head_width % 2 == 0, message)
    expected = "False with model.norm_position=pre, where the first layer has no attention norm"
    _need_value(c, "model.share_layers", not (m.share_layers and m.norm_position == "pre"), expected)
    _need_value(c, "model.activation", m.activation == "gelu" or not m.glu, "gelu with model.glu")
    longer = f"longer than model.max_positions, {m.max_positions}; raise model.max_positions"
    _need((c.data.seq_len or 0) <= m.max_positions, f"data.seq_len is {c.data.seq_len}, {longer}")
    _need_at_most_1(c, "objective.mask_replace_prob", "objective.random_replace_prob")


def _check_attention(c: Config) -> None:
    kernel = c.model.attention
    if kernel not in ("splash", "cudnn"):
        return
    tile, why = (2 if kernel == "cudnn" else 128), f"with model.attention={kernel}"
    _need_value(c, "data.seq_len", (c.data.seq_len or 0) % tile == 0, f"a multiple of {tile} {why}")
    _need_equal(c, why, model__attention_dropout_rate=0, train__reproducible=False)
    if kernel == "cudnn":
        _need_equal(c, why, model__dtype="bfloat16")


def _check_mesh(c: Config) -> None:
    _need_value(c, "mesh.data", c.mesh.data == -1 or c.mesh.data >= 1, "at least 1, or -1 for all remaining devices")
    for path in ("model.num_heads", "model.intermediate_size"):
        _need_divisible(c, path, by="mesh.tensor")
    _need_divisible(c, "model.vocab_multiple_of", by="mesh.tensor", hint=", such as 128")
    _need_divisible(c, "model.hidden_size", by="mesh.fsdp")
    _need_divisible(c, "train.global_batch_size", by="train.gradient_accumulation_steps")


def _check_generator(c: Config) -> None:
    m, g, size = c.model, c.generator, "objective.generator_size"
    problem = "objective.name=rtd cannot start from init_from: a folder holds only one of its two models"
    _need(not c.init_from, f"{problem}; leave init_from empty")
    _need(c.train.cloze_every == 0, "rtd encoders cannot fill masks; set train.cloze_every=0")
    _need_equal(c, "with rtd, whose models are new", optimizer__head_first_steps=0, optimizer__head_rate_factor=1.0)
    _need_equal(c, "with rtd, which samples from the generator's logits", train__logits_chunks=1)
    expected = "0 with rtd for embeddings of model.hidden_size"
    _need_value(c, "model.embedding_size", m.embedding_size != m.hidden_size, expected)
    nearest = f"such as {max(1, g.num_heads) / m.num_heads:.4g}"
    is_whole = g.num_heads >= 1 and abs(m.num_heads * c.objective.generator_size - g.num_heads) < 0.05
    expected = f"a fraction of model.num_heads, {m.num_heads}, that is a whole number of heads, {nearest}"
    _need_value(c, size, is_whole, expected)
    for what, value, axis in (
        ("number of heads", g.num_heads, "tensor"),
        ("intermediate size", g.intermediate_size, "tensor"),
        ("hidden size", g.hidden_size, "fsdp"),
    ):
        devices = getattr(c.mesh, axis)
        expected = f"the generator's {what}, {value}, to be divisible by mesh.{axis}, {devices}"
        _need_value(c, size, value % devices == 0, expected)


def _check_reproducible(c: Config) -> None:
    why = "with train.reproducible"
    rounding = f"{why}, because rounding differs otherwise"
    _need_value(c, "model.scan_layers", c.model.scan_layers is not False, f"True {rounding}")
    _need_equal(c, rounding, model__remat="none", train__logits_chunks=1)
    _need_equal(c, f"{why}, which splits the batch into train.batch_groups", train__gradient_accumulation_steps=1)
    _need_equal(c, why, mesh__tensor=1)
    for path in ("train.global_batch_size", "eval.batch_size"):
        _need_divisible(c, path, by="train.batch_groups")


def check_snapshots(o: OptimizerConfig, steps: int) -> None:
    """Raises UserError if a run of this many steps is too short for the snapshots that `lawa` averages."""
    if o.averaging == "lawa" and (o.lawa_count - 1) * o.lawa_every >= steps:
        span = f"optimizer.lawa_count × optimizer.lawa_every is {o.lawa_count} × {o.lawa_every}"
        raise UserError(f"{span}, which exceeds the run length of {steps} steps; lower one of them")


def _check_training(c: Config) -> None:
    o, t = c.optimizer, c.train
    lengths = [f"train.{name}" for name in LENGTHS if getattr(t, name)]
    _need(len(lengths) < 2, f"{' and '.join(lengths)} are set; set only one length")
    period, every = t.keep_period, t.checkpoint_every
    is_idle = not period or (t.unit == "steps" and period >= t.steps)
    on_grid = is_idle or period % every == 0 or every % period == 0
    grid = f"a multiple of train.checkpoint_every, {every}: other steps are not saved, and cannot be kept"
    _need_value(c, "train.keep_period", on_grid, grid)
    if t.unit == "steps":
        check_snapshots(o, t.steps)
    for setting, value in (("name", "schedule_free"), ("averaging", "lawa")):
        needs = f"optimizer.{setting}={value} needs a known number of steps; set train.steps or train.tokens"
        _need(not t.budget_minutes or getattr(o, setting) != value, f"train.{t.unit} is set, but {needs}")
    if o.name == "schedule_free":
        why = "with optimizer.name=schedule_free"
        _need_equal(c, why, optimizer__schedule="constant")
        _need_equal(c, f"{why}, which averages the weights itself", optimizer__averaging="none")
        _need_value(c, "optimizer.beta1", o.beta1 > 0.0, f"above 0 {why}")
    if o.schedule == "wsd" and not o.warmup_steps:
        _need_at_most_1(c, "optimizer.warmup_fraction", "optimizer.decay_fraction")
