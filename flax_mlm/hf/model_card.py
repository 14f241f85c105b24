"""The README.md of an exported model: what it is, how it was trained, how good it is, how to use it."""

import json
from collections.abc import Mapping
from typing import Any

from flax_mlm.config.schema import Config
from flax_mlm.hf.architecture import Architecture

_USE = {
    "mlm": """```python
from transformers import pipeline

fill = pipeline("fill-mask", model="PATH")
print(fill("The MASK of the people depends on good laws."))
```

As vectors of texts (mean pooling; fine-tune for search or similarity first):

VECTORS""",
    "rtd": """```python
from transformers import AutoModelForPreTraining, AutoTokenizer

tokenizer, model = AutoTokenizer.from_pretrained("PATH"), AutoModelForPreTraining.from_pretrained("PATH")
tokens = tokenizer("The people of the people depends on good laws.", return_tensors="pt")
print(model(**tokens).logits)  # above 0: this token was replaced
```

It is made to be fine-tuned: `AutoModelForSequenceClassification.from_pretrained("PATH")`, or as vectors of texts (mean
pooling; fine-tune for search or similarity first):

VECTORS""",
    "clm": """```python
from transformers import pipeline

generate = pipeline("text-generation", model="PATH")
print(generate("The people of the"))
```""",
}
_VECTORS = """```python
from sentence_transformers import SentenceTransformer

model = SentenceTransformer("PATH")
print(model.encode(["one text", "another"]).shape)
```"""


def text(
    name: str,
    architecture: Architecture,
    config: Config,
    num_params: int,
    tokenizer: Any,
    meta: Mapping[str, Any],
    result: Mapping[str, float] | None,
    licence: str,
    language: str,
) -> str:
    """The card, Markdown with Hugging Face's metadata at its head.

    Args:
      name: of the model.
      meta: of the checkpoint; empty: there is none, but a Hugging Face folder.
      result: of `tasks.mlm` on held-out text; None where none was kept.
      licence, language: as Hugging Face spells them; empty: not stated.
    """
    from huggingface_hub import EvalResult, ModelCardData

    c, about, mask = config, meta.get("text"), tokenizer.tokens[tokenizer.mask_id]
    m, o, causal, tuned = c.model, c.objective, c.objective.name == "clm", meta.get("fine_tuned")
    task, what = {
        "mlm": ("fill-mask", "masked"),
        "clm": ("text-generation", "next"),
        "rtd": ("feature-extraction", "replaced"),
    }[o.name]
    task = "sentence-similarity" if tuned else task
    evaluated = []
    if about and result:
        common = {"task_type": task, "dataset_type": "text", "dataset_name": about["name"], "dataset_split": "held out"}
        evaluated = [
            EvalResult(metric_type=key, metric_value=round(result[key], 4), **common)
            for key in ("loss", "accuracy", "bits_per_byte")
            if key in result
        ]
    head = ModelCardData(
        language=language or None,
        license=licence or None,
        library_name="sentence-transformers" if tuned else "transformers",
        pipeline_tag=task,
        tags=["flax_mlm", o.name],
        model_name=name,
        eval_results=evaluated or None,
    )
    use = _VECTORS if tuned else _USE[o.name].replace("MASK", mask).replace("VECTORS", _VECTORS)
    training = _training(config, mask, meta)
    scores = "Not evaluated."
    if result:
        scores = f"""On held-out documents of the same text, {result["predicted_tokens"]:,.0f} predicted tokens:

| measure | value |
|---|--:|
| {what}-token loss (nats) | {result["loss"]:.4f} ± {result["loss_stderr"]:.4f} |
| {what}-token accuracy | {result["accuracy"]:.4f} ± {result["accuracy_stderr"]:.4f} |
"""
        if o.name == "rtd":
            scores += f"""| replaced tokens found | {result["recall_replaced"]:.4f} |
| originals left alone | {result["recall_original"]:.4f} |
| share of tokens replaced | {result["replaced"]:.4f} |
| masked-token loss of the generator (nats) | {result["generator_loss"]:.4f} |"""
        else:
            scores += f"""| perplexity | {result["perplexity"]:.2f} |
| bits per byte | {result["bits_per_byte"]:.3f} |"""
    elif about and not tuned:
        scores = "Not evaluated: this is a checkpoint of a run that had not ended."
    # The others may name paths of somebody's machine.
    sections = ("model", *(("objective", "optimizer", "train") if about else ()), *(("finetune",) if tuned else ()))
    whole = json.dumps({name: section for name, section in c.to_dict().items() if name in sections}, indent=1)
    kind = "A causal language model" if causal else "An encoder of texts" if tuned else "An encoder"
    return f"""---
{head.to_yaml()}
---

# {name}

{kind} of {num_params:,} parameters (`{architecture.class_name}`),
{"pretrained" if about else "written"} with flax_mlm.

## Use

{use}

## Training

{training}
- Licence of the model: {licence or "not stated"}.
- Model: {m.num_layers} layers, width {m.hidden_size}, {m.num_heads} heads, MLP {m.intermediate_size}\
{" (GeGLU)" * m.glu}, {m.position_embedding} positions up to {m.max_positions}, {m.norm_position}-norm; vocabulary \
{tokenizer.vocab_size:,}.

<details><summary>All settings</summary>

```json
{whole}
```

</details>

## Evaluation

{scores}

## Limits

It knows what its text says, with that text's errors and prejudices. \
{"What it writes may be false." if causal else "It understands rather than writes."}
"""


def _training(config: Config, mask: str, meta: Mapping[str, Any]) -> str:
    """What the weights come from, as a list."""
    o, t, about, tuned = config.objective, config.train, meta.get("text"), meta.get("fine_tuned")
    masks = (
        f"{o.mask_rate:.0%} of the tokens, chosen by {o.masking.replace('_', ' ')}, of those "
        f"{o.mask_replace_prob:.0%} shown as `{mask}`, {o.random_replace_prob:.0%} as a random token"
    )
    sharing = {
        "none": "its own embeddings",
        "shared": "the same embeddings",
        "gradient_disentangled": "embeddings that the encoder's build on (gradient-disentangled sharing)",
    }[o.embedding_sharing]
    predicts = {
        "mlm": f"masked-language modelling (mlm): {masks}",
        "clm": "causal language modelling (clm)",
        "rtd": f"replaced-token detection (rtd, arXiv:2003.10555): {masks}; filled by a generator of "
        f"{config.generator.num_layers} layers of {config.generator.hidden_size} with {sharing}; the encoder's loss "
        f"counts {o.discriminator_weight:g} times",
    }[o.name]
    lines = []
    if config.init_from:
        lines.append(f"- Started from: {config.init_from.rstrip('/').rpartition('/')[2]}.")
    if about:
        average = config.optimizer.averages
        averaged = f"; the weights are their {average} average" if average != "none" else ""
        corpora = about.get("corpora", {"": {**about, "fraction": 1.0}}).values()
        seen = meta.get("totals", {}).get("tokens_seen", 0)
        tokens = f", {seen:,.0f} tokens with the special ones" if seen else ""
        for text in corpora:
            share = f", {text['fraction']:.1%} of the rows" if len(corpora) > 1 else ""
            lines.append(
                f"- Text{share}: {text['name']}; {text['documents']:,} documents, {text['words']:,} words, "
                f"{text['tokens']:,} tokens. Its licence: {text['licence']}."
            )
        lines += [
            f"- Objective: {predicts}.",
            f"- Run: {meta['step']:,} steps of {t.global_batch_size} rows of {config.data.seq_len}"
            f"{tokens}; {config.optimizer.name}, peak learning rate {config.optimizer.learning_rate:g}, "
            f"{config.optimizer.schedule}{averaged}; computed in {config.model.dtype}; seed {config.seed}.",
        ]
    if changes := meta.get("config", {}).get("train", {}).get("phases"):
        lines.append(f"- In phases: `{changes}`. The above is of the last one that it has seen.")
    if tuned:
        lines.append(
            f"- Fine-tuned for search: contrastive (InfoNCE), {tuned['examples']:,} pairs, vectors by "
            f"{config.finetune.pooling} pooling."
        )
    return "\n".join(lines)
