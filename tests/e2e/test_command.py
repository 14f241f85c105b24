"""Command lines: what is wrong ends in one line and code 2, and what should work does."""

import importlib
import json
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from flax_mlm.cli.app import config_arguments, config_of
from flax_mlm.config.knobs import knobs
from flax_mlm.config.load import build, from_dict
from flax_mlm.configs import base, quickstart
from flax_mlm.errors import UserError
from flax_mlm.storage import files
from tests.helpers.paths import ROOT

CONFIGS = sorted((ROOT / "configs").glob("*.py"))
COMMANDS = ("train", "prepare", "audit", "sweep", "evaluate", "compare", "embed", "fill_mask", "export")
OF_BASE = "from flax_mlm.configs import base\ndef get_config():\n    c = base.get_config()\n    {}\n    return c"


@pytest.fixture
def refused(toy, tmp_path):
    """Runs a command that must be refused, in an empty folder that it must leave empty, and returns its one line."""

    def run(command: str, *arguments: object, devices: int = 1) -> str:
        empty = tmp_path / "empty"
        empty.mkdir(exist_ok=True)
        done = toy.run(command, *arguments, devices=devices, cwd=empty)
        assert done.returncode == 2, done
        assert re.fullmatch(r"error: [^\n]+\n", done.stderr), done.stderr
        assert "Traceback" not in done.stdout
        assert not [p for p in empty.rglob("*") if p.is_file() and p.name != "lock"]
        return done.stderr

    return run


@pytest.mark.parametrize(
    "arguments, said",
    [
        (["--config.train.stpes=5"], "config has no field 'train.stpes'; did you mean 'train.steps'?"),
        (["--config.steps=5"], "did you mean 'train.steps'?"),
        (["--config.zzz.qqq=5"], "--print_config lists all fields"),
        (["--config.train.steps=many"], "--config.train.steps is 'many'; expected a whole number"),
        (["--config.train.steps=1.5"], "expected a whole number"),
        (["--config.train.steps=inf"], "expected a whole number"),
        (["--config.model.dropout_rate=little"], "expected a number"),
        (["--config.model.glu=perhaps"], "expected true or false"),
        (["--config.train.steps=none"], "--config.train.steps is 'none'; expected a whole number"),
        (["--config.train.steps"], "--config.train.steps has no value"),
        (
            ["--config.model.position_embedding=absolute"],
            "model.position_embedding is 'absolute'; expected one of learned, rope",
        ),
        (["--config.train.steps=0"], "train.steps is 0; expected a number at least 1"),
        (["--config.objective.mask_rate=1.5"], "expected a number in (0, 1]"),
        (["--config.data.seq_len=4096"], "data.seq_len is 4096, longer than model.max_positions, 512"),
        (["--config.model.num_heads=3"], "expected a number divisible by model.num_heads, 3"),
        (
            ["--config.train.gradient_accumulation_steps=7"],
            "expected a number divisible by train.gradient_accumulation_steps, 7",
        ),
        (["--config.train.phases=50%"], "train.phases: cannot parse '50%'; expected FROM: field=value"),
        (["--config.train.phases=half: objective.name=mlm"], "cannot parse 'half: objective.name=mlm'"),
        (["--config.train.phases=50%: name=mlm"], "config has no field 'name'; did you mean"),
        (["--config.train.phases=50%: optimizer.name=adamw"], "'optimizer.name' cannot change within a run"),
        (["--config.model.attention=flash"], "expected one of auto, xla, splash, cudnn"),
        (
            ["--config.model.attention=splash"],
            "data.seq_len is 64; expected a multiple of 128 with model.attention=splash",
        ),
        (["--config.train.phases=50%: objective.name=both"], "objective.name is 'both'; expected one of mlm, clm"),
        (["--config.train.phases=50%: objective.mask_rate=much"], "objective.mask_rate is 'much'; expected a number"),
        (
            ["--config.train.phases=1100: model.remat=full; 50%: objective.name=mlm"],
            "between steps 1100 and 2200",
        ),
        (["--config.train.phases=100%: objective.name=clm"], "begins at step 2200; expected one between steps 0"),
        (["--stpes=5"], "Unknown command line flag 'stpes'"),
        (["stray"], "unexpected argument 'stray'"),
        (["--config=nowhere.py"], "is 'nowhere.py'; expected a file or a config of flax_mlm; the configs are base,"),
        (["--config=quikstart"], "did you mean 'quickstart'?"),
        (["--config=configs/small.py"], "did you mean 'small'?"),
        ([], "--workdir is missing"),
    ],
)
def test_wrong_options(refused, arguments, said):
    assert said in refused("train", *arguments)


def test_a_name_with_a_newline_is_shown_in_one_line(refused, tmp_path):
    (tmp_path / "new\nline.gz").write_text("text")
    said = refused("prepare", f"--config.data.source=text:{tmp_path}/*.gz", "--output=corpus")
    assert "new\\nline.gz is not compressed by gzip" in said


@pytest.mark.parametrize("platforms", ["foo", "cuda", "cpu,foo", "CPU "])
def test_an_accelerator_that_is_not_there(refused, toy, monkeypatch, platforms):
    monkeypatch.setenv("JAX_PLATFORMS", platforms)
    said = refused("train", *toy.flags(), "--workdir=w")
    assert f"JAX_PLATFORMS is '{platforms}': {'JAX has no plugin' if platforms == 'cuda' else 'Unable to'}" in said
    assert "correct JAX_PLATFORMS, or unset it" in said


@pytest.mark.parametrize(
    "content, said",
    [
        ("def get_config():\n    raise KeyError('lost')", "cannot be loaded: KeyError: 'lost'"),
        ("def get_config(:", "cannot be loaded: SyntaxError"),
        ("x = 1", "has no function get_config"),
        ("def get_config():\n    return {}", "has no function get_config that returns a ConfigDict"),
        (OF_BASE.format("c.x = 1"), "'x'"),
        (OF_BASE.format("del c.seed"), "'seed'"),
        (OF_BASE.format("c.model.depth = 1"), "'model.depth'"),
    ],
    ids=["raises", "no Python", "no get_config", "no ConfigDict", "extra", "lacking", "extra in a section"],
)
def test_wrong_config_files(refused, tmp_path, content, said):
    (tmp_path / "mine.py").write_text(content)
    assert said in refused("train", f"--config={tmp_path / 'mine.py'}", "--workdir=w")


def test_an_override_in_a_section_that_the_file_has_deleted(tmp_path):
    file = tmp_path / "mine.py"
    file.write_text(OF_BASE.format("del c.mesh"))
    with pytest.raises(UserError, match=r'"mesh" was not found'):
        config_of([f"--config={file}", "--config.mesh.fsdp=1"])


@pytest.mark.parametrize(
    "source, said",
    [
        ("books", "data.source is 'books'; expected builtin or one of text:GLOB"),
        ("text:none/*.txt", "no file matches 'none/*.txt'"),
        ("tfds:no_such_set", "'no_such_set' is not prepared"),
        ("text:{folder}/empty.txt", "holds no text"),
        ("text:{folder}/one.txt", "is one document"),
    ],
)
def test_wrong_sources(refused, toy, tmp_path, source, said):
    (tmp_path / "empty.txt").write_text("")
    (tmp_path / "one.txt").write_text("A single document.")
    source = source.format(folder=tmp_path)
    line = refused("prepare", *toy.flags(data__corpus="", data__source=source), f"--output={tmp_path / 'out'}")
    assert said in line
    assert not (tmp_path / "out").exists()


def test_a_vocabulary_that_the_text_does_not_support(refused, toy, tmp_path):
    source = f"text:{toy.text}"
    flags = toy.flags(data__corpus="", data__source=source, tokenizer__vocab_size=9000)
    assert re.search(r"tokenizer.vocab_size is 9000; expected at most \d+", refused("prepare", *flags, "--output=x"))


@pytest.mark.parametrize(
    "changes, devices, said",
    [
        ({"train__global_batch_size": 12}, 8, "train.global_batch_size is 12; expected a multiple of 8"),
        ({"train__gradient_accumulation_steps": 4}, 8, "expected a multiple of 32"),
        ({"eval__batch_size": 12}, 8, "eval.batch_size is 12; expected a multiple of 8"),
        ({"mesh__data": 16}, 8, "expected 8, the number of devices"),
    ],
)
def test_a_mesh_that_does_not_fit(refused, toy, changes, devices, said):
    assert said in refused("train", "--workdir=w", *toy.flags(**changes), devices=devices)


def test_a_workdir_of_another_run(refused, toy, trained_run):
    before = {p: p.stat().st_mtime_ns for p in trained_run.rglob("*")}
    line = refused("train", f"--workdir={trained_run}", *toy.flags(model__num_layers=3))
    assert "holds a run with model.num_layers = 2, and this one has 3; use another --workdir" in line
    assert before == {p: p.stat().st_mtime_ns for p in trained_run.rglob("*")}
    refused("train", f"--workdir={toy.text}", *toy.flags())
    line = refused("train", f"--workdir={trained_run}", *toy.flags(model__attention_dropout_rate=0.1))
    assert "model.attention_dropout_rate = 0.0, and this one has 0.1" in line, "model.attention may change; not this"


@pytest.fixture(scope="module")
def other_corpus(toy) -> Path:
    """The same text, with another tokenizer."""
    output = toy.folder / "other"
    flags = toy.flags(data__corpus="", data__source=f"text:{toy.text}", tokenizer__vocab_size=300)
    done = toy.run("prepare", *flags, f"--output={output}")
    assert done.returncode == 0, done.stderr
    return output


def test_a_corpus_of_another_tokenizer(refused, toy, trained_run, other_corpus, tmp_path):
    swapped = shutil.copytree(toy.corpus, tmp_path / "swapped")
    shutil.copy(other_corpus / "tokenizer.model", swapped)
    for command, arguments in (
        ("train", [f"--workdir={tmp_path / 'w'}", *toy.flags()]),
        ("evaluate", [f"--checkpoint={trained_run}"]),
    ):
        line = refused(command, *arguments, f"--config.data.corpus={swapped}")
        assert f"{swapped}/tokenizer.model has " in line
        assert "corpus.json says" in line
    both = toy.flags(tokenizer__path=other_corpus / "tokenizer.model")
    assert "was made with another tokenizer than" in refused("train", f"--workdir={tmp_path / 'w2'}", *both)
    line = refused("evaluate", f"--checkpoint={trained_run}", f"--config.data.corpus={other_corpus}", "--json=out.json")
    assert "was made with another tokenizer than the checkpoint" in line


def test_a_corpus_with_rows_longer_than_the_positions(refused, toy, tmp_path):
    flags = toy.flags(data__seq_len=16, model__max_positions=16)
    assert "model.max_positions is 16; expected at least 32, the row length of data.corpus" in refused(
        "train", f"--workdir={tmp_path / 'w'}", *flags
    )


def test_no_corpus_where_one_is_named(refused, toy, tmp_path):
    line = refused("train", f"--workdir={tmp_path / 'w'}", *toy.flags(data__corpus=tmp_path))
    assert "is not a corpus" in line


def test_no_checkpoint(refused, trained_run, tmp_path):
    assert "no checkpoint in" in refused("evaluate", f"--checkpoint={tmp_path}")
    assert "has no step 7; it has 200, 300" in refused("evaluate", f"--checkpoint={trained_run}@7")
    assert "--checkpoint is missing" in refused("fill_mask", "The [MASK].")


def test_a_text_that_cannot_be_filled(refused, trained_run):
    assert "has no [MASK]" in refused("fill_mask", f"--checkpoint={trained_run}", "The dog.")
    assert "has no [MASK]" in refused("fill_mask", f"--checkpoint={trained_run}")
    assert "this model was trained on at most 32" in refused(
        "fill_mask", f"--checkpoint={trained_run}", "The [MASK]" + " barks" * 40
    )
    assert "unexpected argument 'more'" in refused("fill_mask", f"--checkpoint={trained_run}", "The [MASK].", "more")


def printed(toy, *arguments: object) -> dict:
    done = toy.run("train", *arguments, "--print_config")
    assert (done.returncode, done.stderr) == (0, "")
    return json.loads(done.stdout)


def test_spellings_that_work(toy, tmp_path):
    with_space = tmp_path / "my config.py"
    with_space.write_text((ROOT / "configs" / "small.py").read_text())
    config = printed(
        toy, "--config", with_space, "--config.train.steps=1e6", "--config.tokenizer.sample_bytes", "1_000",
        "--config.model.scan_layers=none", "--noconfig.log.tensorboard", "--config.model.glu",
        "--config.optimizer.learning_rate=1", "--config.data.source=text:a=b c#d",
    )  # fmt: skip
    assert config["train"]["steps"] == 1_000_000
    assert config["tokenizer"]["sample_bytes"] == 1000
    assert config["model"]["scan_layers"] is None
    assert config["log"]["tensorboard"] is False
    assert config["model"]["glu"] is True
    assert config["model"]["position_embedding"] == "rope"
    assert config["optimizer"]["learning_rate"] == 1.0
    assert config["data"]["source"] == "text:a=b c#d"
    assert printed(toy, "--config.model.scan_layers=yes")["model"]["scan_layers"] is True
    assert printed(toy) == build(quickstart.get_config()).to_dict()


def test_the_last_of_several_counts(toy):
    none, some = "--config.model.scan_layers=none", "--config.model.scan_layers=false"
    assert printed(toy, none, some)["model"]["scan_layers"] is False
    assert printed(toy, some, none)["model"]["scan_layers"] is None


def test_the_arguments_of_a_config_make_it_again(toy):
    line = [
        "--config", str(ROOT / "configs" / "small.py"), "--config.train.steps", "1e6", "--noconfig.log.tensorboard",
        "--config.model.scan_layers=none", "--config.model.glu", "-config.data.source=text:a=b c#d",
    ]  # fmt: skip
    arguments = config_arguments(["train", "--workdir=w", *line, "--dry_run"])
    assert all(argument.startswith("--config") and "=" in argument for argument in arguments)
    assert config_of(arguments).to_dict() == printed(toy, *line)


def test_a_checkpoint_gives_its_config(toy, trained_run):
    done = toy.run("evaluate", f"--checkpoint={trained_run}", "--config.eval.max_rows=7", "--print_config")
    config = json.loads(done.stdout)
    assert config["eval"]["max_rows"] == 7
    assert config["model"] == json.loads((trained_run / "config.json").read_text())["model"]


def test_a_checkpoint_older_than_a_field_has_its_default(toy, trained_run, tmp_path):
    folder = tmp_path / "old"
    shutil.copytree(trained_run / "checkpoints" / "300", folder)
    file = folder / "meta" / "metadata"
    meta = json.loads(file.read_text())
    del meta["config"]["finetune"], meta["config"]["train"]["phases"]
    meta["sha256"] = files.digest(meta)
    file.write_text(json.dumps(meta))
    done = toy.run("evaluate", f"--checkpoint={folder}", "--print_config")
    assert done.returncode == 0, done.stderr
    found, defaults = json.loads(done.stdout), build(base.get_config()).to_dict()
    assert found["finetune"] == defaults["finetune"]
    assert found["train"]["phases"] == ""
    assert found["model"]["hidden_size"] == 32


@pytest.mark.parametrize("path", CONFIGS, ids=lambda p: p.stem)
def test_name_path_and_module_of_a_config_are_the_same(path, monkeypatch):
    monkeypatch.chdir("/")
    module = importlib.import_module(f"flax_mlm.configs.{path.stem}")
    assert config_of([f"--config={path.stem}"]) == build(module.get_config())
    assert config_of([f"--config={path}"]) == build(module.get_config())


def test_a_name_takes_an_argument_and_means_the_config_where_a_file_has_the_same(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "objectives").write_text("")
    assert config_of(["--config=objectives:clm"]).objective.name == "clm"


def test_a_file_may_have_a_colon_in_its_name(tmp_path):
    file = tmp_path / "lr:1e-3.py"
    shutil.copy(CONFIGS[0], file)
    assert config_of([f"--config={file}"]) == config_of([f"--config={CONFIGS[0]}"])


@pytest.mark.parametrize("path", CONFIGS, ids=lambda p: p.stem)
def test_every_config_builds(toy, path):
    config = printed(toy, f"--config={path}")
    build(from_dict(config))


def test_an_unknown_field_of_a_config_built_in_python_is_named_with_the_nearest_one():
    config = base.get_config()
    config.train.stepz = 3
    with pytest.raises(UserError, match=r"no field 'train\.stepz'; did you mean 'train\.steps'"):
        build(config)


def test_base_and_the_dataclasses_name_the_same_fields_in_the_same_order():
    source = (ROOT / "configs" / "base.py").read_text()
    assert re.findall(r"^    c\.([\w.]+) = (?!ConfigDict)", source, re.MULTILINE) == list(knobs())


def test_every_default_has_the_type_of_its_field():
    values = base.get_config()
    for path, knob in knobs().items():
        node = values
        for name in path.split("."):
            node = node.get_oneway_ref(name).get() if node.get_ref(name).get() is None else node[name]
        assert (node is None and knob.optional) or type(node) is knob.type, path


@pytest.mark.parametrize("command", COMMANDS)
def test_help_is_complete_and_light(command):
    line = [sys.executable, "-X", "importtime", "-m", f"flax_mlm.{command}", "--help"]
    done = subprocess.run(line, capture_output=True, text=True, cwd=ROOT)
    imported = {line.rpartition("|")[2].strip().partition(".")[0] for line in done.stderr.splitlines()}
    assert "absl" in imported
    assert not imported & {"jax", "flax", "tensorflow", "orbax", "sentencepiece"}
    assert "Traceback" not in done.stderr
    assert done.returncode == 0
    assert f"python -m flax_mlm.{command}" in done.stdout
    for flag in ("--config", "--[no]print_config", {"train": "--workdir", "prepare": "--output"}.get(command, "--")):
        assert f"  {flag}" in done.stdout
