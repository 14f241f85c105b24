"""Several languages as a user trains them: one tokenizer, a corpus each, alpha that falls, languages that join."""

import json
import shutil
from pathlib import Path

import numpy as np
import pytest

from flax_mlm.checkpoint.store import saved_steps
from flax_mlm.config.load import build
from flax_mlm.data.mixture import Mixture
from flax_mlm.inference.config import read_config
from tests.helpers.runs import assert_same_run, finish, metrics_of

STEPS = 18
SIZES = {"big": 12, "middle": 4, "small": 1}


@pytest.fixture(scope="module")
def corpora(toy) -> Path:
    """Corpora `big`, `middle` and `late/small` with a tokenizer that `prepare --tokenizer_only` made for all."""
    folder = toy.folder / "languages"
    folder.mkdir()
    for number, (name, times) in enumerate(SIZES.items()):
        pairs = list(toy.animals.items())
        sentences = [f"{name} {animal} {number} {does} {name}{i}." for i in range(times) for animal, does in pairs]
        (folder / f"{name}.txt").write_text("\n\n".join(sentences))
    sources = [f"text:{folder}/{name}.txt" for name in SIZES]
    common = {"data__corpus": "", "data__sampling_alpha": 0.5}
    flags = toy.flags(**common, data__source="|".join(sources))
    done = toy.run("prepare", *flags, "--tokenizer_only", f"--output={folder}/tokenizer")
    assert done.returncode == 0, done.stderr
    assert f"prepare each corpus with --config.tokenizer.path={folder}/tokenizer" in done.stdout
    for name, source in zip(SIZES, sources, strict=True):
        flags = toy.flags(data__corpus="", data__source=source, tokenizer__path=folder / "tokenizer")
        output = folder / ("late/small" if name == "small" else f"corpora/{name}")
        output.parent.mkdir(exist_ok=True)
        done = toy.run("prepare", *flags, "--config.data.validation_fraction=0.25", f"--output={output}")
        assert done.returncode == 0, done.stderr
    return folder


def run_flags(toy, folder: Path) -> list[str]:
    phases = f"6: data.sampling_alpha=0.5; 12: data.corpus={folder}/corpora/*,{folder}/late/*, data.sampling_alpha=0.3"
    return toy.flags(
        **{"data__corpus": f"{folder}/corpora/*", "data__sampling_alpha": 0.7, "train__phases": phases},
        **{"train__steps": STEPS, "train__checkpoint_every": 3, "train__keep_period": 3, "train__eval_every": 9},
    )


@pytest.fixture(scope="module")
def straight(toy, corpora) -> Path:
    workdir = toy.folder / "annealed"
    out = finish(toy, workdir, *run_flags(toy, corpora))
    (toy.folder / "annealed.log").write_text(out)
    return workdir


def test_a_run_says_its_alpha_and_reads_by_it(toy, corpora, straight):
    out = (toy.folder / "annealed.log").read_text()
    for line in ("2 corpora in proportion to rows ** 0.7", "2 corpora in proportion to rows ** 0.5"):
        assert f"sampling    {line} (data.sampling_alpha)" in out
    assert "sampling    3 corpora in proportion to rows ** 0.3" in out
    assert "from step 12 (67%) on data.corpus=" in out
    last = Mixture.open(build(read_config(str(straight))).data)
    assert list(last.corpora) == ["big", "middle", "small"]
    rows = np.array(last.stream().num_rows)
    read = {name: 0.0 for name in last.corpora}
    for names, alpha in ((["big", "middle"], 0.7), (["big", "middle"], 0.5), (["big", "middle", "small"], 0.3)):
        powers = rows[: len(names)] ** alpha
        for name, power in zip(names, powers, strict=True):
            read[name] += 6 * 16 * power / powers.sum()
    for name, n in zip(last.corpora, rows, strict=True):
        assert metrics_of(straight)[-1][f"epochs/{name}"] * n == pytest.approx(read[name], abs=2)


@pytest.mark.parametrize(
    "step", [12, pytest.param(6, marks=pytest.mark.full), pytest.param(15, marks=pytest.mark.full)]
)
def test_killed_at_a_change_it_goes_on_exactly(toy, corpora, straight, tmp_path, step):
    workdir = shutil.copytree(straight, tmp_path / "copy")
    for later in saved_steps(workdir):
        if later > step:
            shutil.rmtree(workdir / "checkpoints" / str(later))
    assert f"restored step {step}" in finish(toy, workdir, *run_flags(toy, corpora))
    assert_same_run(workdir, straight, STEPS)


def test_every_language_is_in_one_table(toy, corpora, straight, tmp_path):
    result = json.loads((straight / "result.json").read_text())
    done = toy.run(
        "evaluate", f"--checkpoint={straight}", "--mask_rates=", "--config.eval.max_rows=2", f"--json={tmp_path / 'x'}"
    )
    assert done.returncode == 0, done.stderr
    few = json.loads((tmp_path / "x").read_text())
    table = done.stdout.partition("by corpus:\n")[2].splitlines()[:3]
    assert [line.split()[0] for line in table] == ["big", "middle", "small"]
    mixture = Mixture.open(build(read_config(str(straight))).data)
    for (name, corpus), line in zip(mixture.corpora.items(), table, strict=True):
        counts = corpus.counts["validation"]
        assert result[f"tokens_per_word/{name}"] == few[f"tokens_per_word/{name}"] == counts["tokens"] / counts["words"]
        assert f"bits/byte {few[f'bits_per_byte/{name}']:.3f}  tokens/word " in line
        assert few[f"rows/{name}"] == 1
        assert f"{few[f'predicted_tokens/{name}']} tokens in 1 row" in line
        assert "±" not in line
        bits = result[f"loss/{name}"] / np.log(2) * counts["tokens"] / counts["bytes"]
        assert result[f"bits_per_byte/{name}"] == pytest.approx(bits)
    assert sum(result[f"rows/{name}"] for name in mixture.corpora) == result["rows"]


def test_the_plan_shows_what_is_read(toy, corpora):
    done = toy.run("plan", *run_flags(toy, corpora))
    assert done.returncode == 0, done.stderr
    assert "data        from 33% on 2 corpora, by rows ** 0.5" in done.stdout
    assert "data        from 67% on 3 corpora, by rows ** 0.3" in done.stdout


def test_another_alpha_is_another_run(toy, corpora, straight):
    flags = run_flags(toy, corpora)
    done = toy.run("train", f"--workdir={straight}", *flags, "--config.data.sampling_alpha=0.6")
    assert done.returncode == 2
    assert "a run with data.sampling_alpha = 0.7, and this one has 0.6" in done.stderr
    weights = f"--config.data.corpus={corpora}/corpora/big:2,{corpora}/corpora/middle:1"
    done = toy.run("train", f"--workdir={straight}", *flags, weights)
    assert done.returncode == 2
    assert "data.sampling_alpha is 0.7, and data.corpus has weights" in done.stderr
    assert done.stderr.count("\n") == 1
