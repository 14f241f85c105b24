"""One small run from text to an exported encoder, killed on its way. The only test of commands in `--quick`."""

import pytest

import flax_mlm
from tests.helpers.runs import Watched, finish


@pytest.mark.quick
def test_text_goes_in_and_an_encoder_comes_out(toy, tmp_path):
    workdir = tmp_path / "run"
    flags = toy.flags(train__checkpoint_every=50, model__glu=True, model__type_vocab_size=0)  # ModernBERT, for export
    run = Watched(toy, workdir, *flags)
    run.until_path("checkpoints/50/commit_success.txt")
    run.kill()
    out = finish(toy, workdir, *flags)
    assert "restored step" in out
    assert "step 300/300  loss" in out

    done = toy.run("evaluate", f"--checkpoint={workdir}")
    assert done.returncode == 0, done.stderr
    assert "held-out masked-token loss" in done.stdout

    done = toy.run("export", f"--checkpoint={workdir}", f"--output={tmp_path / 'encoder'}")
    assert done.returncode == 0, done.stderr
    (best,) = flax_mlm.load(tmp_path / "encoder").fill_mask("The dog [MASK] in the garden today.", top_k=1)
    assert best["token_str"] == "barks"
