"""What a change must not alter unnoticed: resolved configs, parameter trees, ten steps of metrics.

Run `bash launch/test.sh tests/parity/test_golden.py --update_golden` when a difference is meant, and read the diff of
tests/golden/ as part of the change: a hyper-parameter that moved, a parameter renamed (old checkpoints no longer
load), a loss that is no longer the same.
"""

import json

import jax
import pytest

from flax_mlm.config.load import build
from flax_mlm.config.schema import MeshConfig
from flax_mlm.configs import (
    base,
    bert_base,
    bert_large,
    continue_pretraining,
    electra_small,
    mmbert_base,
    modernbert_base,
    modernbert_large,
    objectives,
    quickstart,
    small,
)
from flax_mlm.distributed.mesh import make_mesh, param_spec
from flax_mlm.model import electra, heads
from tests.helpers.golden import compare_golden
from tests.helpers.steps import train

CONFIGS = [base, quickstart, small, objectives, bert_base, bert_large, electra_small, modernbert_base, modernbert_large]
CONFIGS += [mmbert_base, continue_pretraining]
BY_NAME = pytest.mark.parametrize("module", CONFIGS, ids=lambda m: m.__name__.split(".")[-1])


@BY_NAME
def test_resolved_config(request, module):
    values = build(module.get_config()).to_dict()
    compare_golden(request, f"{module.__name__.split('.')[-1]}.config.json", json.dumps(values, indent=1) + "\n")


@BY_NAME
def test_parameter_tree(request, module):
    config = build(module.get_config())
    vocab_size = config.tokenizer.vocab_size
    if config.objective.name == "rtd":
        _, model = electra.networks(config, vocab_size)
    else:
        model = heads.language_model(config.model, vocab_size)
    mesh = make_mesh(MeshConfig(2, 2, 2))
    with jax.set_mesh(mesh):
        shapes = jax.eval_shape(model.init, jax.random.key(0))

    def line(path, x, dims: str) -> str:
        name = "/".join(k.key for k in path)
        return f"{name:55} {x.dtype} {x.shape!s:25} {param_spec(dims, x.ndim)}"

    lines = jax.tree.leaves(jax.tree_util.tree_map_with_path(line, shapes, model.dims))
    compare_golden(request, f"{module.__name__.split('.')[-1]}.params.txt", "\n".join(lines) + "\n")


def test_ten_steps_of_training(request):
    """To four digits: the same on every CPU, while a change of recipe, masks or data order shows."""
    history, _ = train((1, 1, 1), (("model.dropout_rate", 0.0), ("model.attention_dropout_rate", 0.0)), 10)
    lines = (
        f"{i} loss {m['loss']:.4g} accuracy {m['accuracy']:.4g} grad_norm {m['grad_norm']:.3g}"
        for i, m in enumerate(history)
    )
    compare_golden(request, "ten_steps.txt", "\n".join(lines) + "\n")
