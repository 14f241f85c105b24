"""Trains the same small encoder with one of four objectives, on the same rows in the same order, to compare them.

    bash launch/compare_objectives.sh
    python -m flax_mlm.train --config=objectives:clm --workdir=runs/clm

The objective follows the colon: `mlm_15` and `mlm_30` (masked, 15% and 30% of the tokens predicted), `clm` (next
token), `clm_mlm` (biphasic, arXiv:2507.00994: next token for half of the steps, then masked at 30%).
15 to 25 minutes each on two CPU cores.
"""

from ml_collections import ConfigDict

from flax_mlm.configs import small

OBJECTIVES = ("mlm_15", "mlm_30", "clm", "clm_mlm")


def get_config(objective: str = "mlm_15") -> ConfigDict:
    c = small.get_config()
    c.model.hidden_size = 192
    c.model.num_heads = 3
    c.model.intermediate_size = 528

    c.objective.name = "clm" if objective.startswith("clm") else "mlm"
    c.objective.mask_rate = 0.15 if objective == "mlm_15" else 0.3
    c.train.phases = "50%: objective.name=mlm" if objective == "clm_mlm" else ""
    if objective not in OBJECTIVES:
        raise ValueError(f"the objective is '{objective}'; expected one of {', '.join(OBJECTIVES)}")

    c.train.steps = 1200
    c.train.global_batch_size = 64
    c.train.eval_every = 300
    c.train.checkpoint_every = 300
    return c
