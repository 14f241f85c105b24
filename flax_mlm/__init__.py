"""flax_mlm: masked-language-model pretraining in JAX/Flax, from text to an exported encoder.

Reading order: train, config, data/, masking, model/, objective, optimizer, sharding, step,
checkpoint, metrics, evaluate, tasks/, fill_mask.
"""

__version__ = "0.2.0"
