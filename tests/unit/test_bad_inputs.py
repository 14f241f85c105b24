"""Bad values for every field of the config, on every command: one line that names the field, and exit code 2.

Found by rule rather than by hand: what is wrong for a type is tried on every field of that type.
"""

import contextlib
import difflib
import io
import re
import sys

import pytest
from absl import flags
from hypothesis import given, settings
from hypothesis import strategies as st

from flax_mlm.cli import app
from flax_mlm.config.knobs import knobs
from flax_mlm.configs import base
from flax_mlm.distributed import environment

FIELDS = knobs()
BAD_TEXTS = {
    int: ("many", "1.5", "nan", "inf", "-inf", "", "1e400", "0x10", "1,000", "--", "²", "1 2"),
    float: ("little", "", "1,5", "0x1p3", "1e", "½", "1 2"),
    bool: ("perhaps", "2", "", "yess", "tru", "none", "0.0"),
}


@pytest.fixture(scope="module", autouse=True)
def no_preparation():
    """What runs before a command's own code must not change this process."""
    with pytest.MonkeyPatch.context() as m:
        m.setattr(environment, "prepare", lambda *_: None)
        yield


def outcome(*arguments: str) -> tuple[int, str, str]:
    """Exit code, stdout and stderr of a command that would do nothing."""
    out, err = io.StringIO(), io.StringIO()
    with pytest.MonkeyPatch.context() as m, contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
        m.setattr(sys, "argv", ["flax_mlm.train", f"--config={base.__file__}", *arguments])
        try:
            app.run(lambda config: None)
        except SystemExit as e:
            return e.code, out.getvalue(), err.getvalue()
        finally:
            for name in list(flags.FLAGS):
                if name == "print_config" or name.startswith("config"):
                    delattr(flags.FLAGS, name)
            flags.FLAGS.unparse_flags()
    raise AssertionError("it returned")


def refused(*arguments: str) -> str:
    code, out, err = outcome(*arguments)
    assert (code, out) == (2, ""), (code, out, err)
    assert re.fullmatch(r"error: [^\n]+\n", err), err
    return err


def test_the_way_of_asking_is_right():
    assert outcome() == (0, "", "")


@pytest.mark.parametrize(
    ("path", "text"),
    [
        (path, text)
        for path, knob in FIELDS.items()
        for text in BAD_TEXTS.get(knob.type, ())
        if not (knob.optional and text == "none")
    ],
)
def test_what_is_not_of_the_type(path, text):
    line = refused(f"--config.{path}={text}")
    assert path in line
    assert f"'{text}'" in line
    assert "expected" in line


NUMBERS = [path for path, knob in FIELDS.items() if knob.type in (int, float)]


@pytest.mark.parametrize("path", NUMBERS)
@pytest.mark.parametrize("value", ["-2", str(2**31), str(10**30)])
def test_what_is_below_or_beyond_every_number_that_makes_sense(path, value):
    kind = FIELDS[path].type
    if kind is float and value != "-2":
        value = "inf" if value == str(10**30) else "nan"
    line = refused(f"--config.{path}={value}")
    assert path in line, line
    assert "expected" in line, line


@settings(max_examples=200, deadline=None)
@given(st.sampled_from(NUMBERS), st.one_of(st.integers(-(10**12), -2), st.floats(-1e30, -1.0000001)))
def test_negative_numbers_are_refused(path, value):
    kind = FIELDS[path].type
    assert path in refused(f"--config.{path}={int(value // 1) if kind is int else value}")


CHOICES = {path: knob.allowed for path, knob in FIELDS.items() if isinstance(knob.allowed, tuple)}


@pytest.mark.parametrize("path", CHOICES)
@pytest.mark.parametrize("text", ["", "none of these", "ADAMW", "$(touch x)", "mlm "])
def test_unknown_choices_are_answered_with_the_known(path, text):
    line = refused(f"--config.{path}={text}")
    assert path in line
    assert f"'{text}'" in line
    assert all(choice in line for choice in CHOICES[path])


@settings(max_examples=200, deadline=None)
@given(st.sampled_from(sorted(FIELDS)), st.data())
def test_a_misspelt_field_is_answered_with_a_real_one(path, data):
    section, _, name = path.rpartition(".")
    place = data.draw(st.integers(0, len(name) - 1))
    letter = data.draw(st.sampled_from(["", name[place] * 2, "x"]))
    wrong = f"{section}." * bool(section) + name[:place] + letter + name[place + 1 :]
    if wrong in FIELDS or not name[:place] + letter + name[place + 1 :]:
        return
    line = refused(f"--config.{wrong}=1")
    meant = re.search(r"did you mean '([\w.]+)'", line)
    assert f"no field '{wrong}'" in line
    assert meant
    assert meant[1] in FIELDS
    assert meant[1] in difflib.get_close_matches(wrong, FIELDS, n=1, cutoff=0.5) or meant[1] == path


@pytest.mark.parametrize("period", ["0", "500", "2000", "20000", "12345"])
def test_a_period_of_which_no_checkpoint_is_lost_is_taken(period):
    assert outcome("--config.train.steps=10000", f"--config.train.keep_period={period}") == (0, "", "")


@pytest.mark.parametrize(
    ("arguments", "named"),
    [
        (["model.hidden_size=100", "model.num_heads=3"], "model.hidden_size"),
        (["model.hidden_size=36", "model.num_heads=12", "model.position_embedding=rope"], "rope needs an even number"),
        (["data.seq_len=1024"], "model.max_positions"),
        (["data.corpus=a:1,b"], "data.corpus"),
        (["mesh.tensor=5"], "mesh.tensor"),
        (["mesh.fsdp=7"], "mesh.fsdp"),
        (["mesh.data=0"], "mesh.data"),
        (["train.gradient_accumulation_steps=3"], "train.global_batch_size"),
        (["train.reproducible=True", "train.gradient_accumulation_steps=2"], "train.gradient_accumulation_steps"),
        (["train.reproducible=True", "mesh.tensor=2"], "mesh.tensor"),
        (["train.reproducible=True", "model.remat=full"], "model.remat"),
        (["train.reproducible=True", "model.scan_layers=False"], "model.scan_layers"),
        (["train.reproducible=True", "train.logits_chunks=4"], "train.logits_chunks"),
        (["train.reproducible=True", "train.batch_groups=7"], "train.batch_groups"),
        (["train.reproducible=True", "eval.batch_size=12"], "eval.batch_size"),
        (["objective.mask_replace_prob=0.9", "objective.random_replace_prob=0.2"], "objective.mask_replace_prob"),
        (["optimizer.schedule=wsd", "optimizer.warmup_fraction=0.9"], "optimizer.warmup_fraction"),
        (["optimizer.averaging=lawa", "train.steps=800"], "optimizer.lawa_count"),
        (["train.keep_period=1500"], "train.keep_period is 1500; expected a multiple of train.checkpoint_every, 1000"),
        (["train.checkpoint_every=300", "train.keep_period=200"], "train.keep_period"),
        (["optimizer.name=schedule_free"], "optimizer.schedule"),
        (
            ["optimizer.name=schedule_free", "optimizer.schedule=constant", "optimizer.averaging=ema"],
            "averaging is ema",
        ),
        (["optimizer.name=schedule_free", "optimizer.schedule=constant", "optimizer.beta1=0"], "optimizer.beta1"),
    ],
)
def test_values_that_contradict_each_other(arguments, named):
    assert named in refused(*(f"--config.{a}" for a in arguments))


@pytest.mark.parametrize(
    ("argument", "said"),
    [
        ("--nothing", "nothing"),
        ("-x", "x"),
        ("stray", "unexpected argument 'stray'"),
        ("--config.train", "no field 'train'"),
        ("--config.train=5", "no field 'train'"),
        ("--config.train.steps.more=5", "no field 'train.steps.more'"),
        ("--config.train.steps", "has no value"),
        ("--noconfig.train.steps", "train.steps"),
        ("--config.=5", "config has no field ''"),
        ("--config.train..steps=5", "no field"),
        ("--print_config=perhaps", "print_config"),
        ("--config=", "--config is ''"),
        ("--config=/", "--config is '/'"),
        ("--config=/dev/null", "--config is '/dev/null'"),
        ("--config=nowhere.py:argument", "--config is 'nowhere.py'"),
    ],
)
def test_options_that_are_none(argument, said):
    assert said in refused(argument)


@pytest.mark.parametrize(
    ("name", "argument"),
    [
        ("train", "--heartbeat=0"),
        ("train", "--process_id=-7"),
        ("train", "--num_processes=-1"),
        ("train", "--initialization_timeout=soon"),
        ("evaluate", "--task=nothing"),
        ("evaluate", "--json"),
        ("evaluate", "--variant=both"),
        ("fill_mask", "--top_k=0"),
        ("export", "--dtype=int8"),
        ("export", "--architecture=gpt2"),
        ("export", "--int8"),
        ("export", "--max_drop=-1"),
        ("verify_resume", "--steps=1"),
        ("verify_resume", "--shapes=2by2"),
        ("verify_resume", "--shapes=2x0"),
        ("verify_resume", "--kills=none"),
        ("sweep", "--seeds=0"),
        ("sweep", "--grid=optimizer.name"),
        ("prepare", "--output=/proc/nothing/here"),
        ("audit", "--corpus"),
    ],
)
def test_options_of_each_command(toy, trained_run, name, argument):
    checkpoint = [f"--checkpoint={trained_run}"] * (name in ("evaluate", "fill_mask", "export"))
    corpus = [*toy.flags(data__corpus="", data__source=f"text:{toy.text}")] * (name == "prepare")
    done = toy.run(name, *checkpoint, *corpus, argument)
    assert done.returncode == 2, done
    assert re.fullmatch(r"error: [^\n]+\n", done.stderr), done
    name, _, value = argument.strip("-").partition("=")
    assert name in done.stderr or (value and value in done.stderr)
