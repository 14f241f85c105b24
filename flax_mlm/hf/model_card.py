"""The model card (README.md) of an exported model: use, training, evaluation, limits."""

import dataclasses
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


_TASKS = {"mlm": "fill-mask", "clm": "text-generation", "rtd": "feature-extraction"}
_PREDICTS = {"mlm": "masked", "clm": "next", "rtd": "replaced"}
_SHARING = {
    "none": "its own embeddings",
    "shared": "the same embeddings",
    "gradient_disentangled": "embeddings that the encoder's build on (gradient-disentangled sharing)",
}


@dataclasses.dataclass
class ModelCard:
    """A card, Markdown with Hugging Face's metadata at its head.

    Attributes:
      meta: of the checkpoint; empty where the model comes from a Hugging Face folder.
      result: of the evaluation of mlm on held-out text; None where there is none.
      licence, language: as Hugging Face spells them; empty: not stated.
    """

    name: str
    architecture: Architecture
    config: Config
    num_params: int
    tokenizer: Any
    meta: Mapping[str, Any]
    result: Mapping[str, float] | None
    licence: str
    language: str

    def text(self) -> str:
        """Returns the whole card."""
        is_causal = self.config.objective.name == "clm"
        kind = "A causal language model" if is_causal else "An encoder of texts" if self._fine_tuned else "An encoder"
        return f"""---
{self._metadata()}
---

# {self.name}

{kind} of {self.num_params:,} parameters (`{self.architecture.class_name}`),
{"pretrained" if self._corpus else "written"} with flax_mlm.

## Use

{self._use()}

## Training

{self._training()}
{self._model()}

<details><summary>All settings</summary>

```json
{self._settings()}
```

</details>

## Evaluation

{self._evaluation()}

## Limits

It knows what its text says, with that text's errors and prejudices. \
{"What it writes may be false." if is_causal else "It understands rather than writes."}
"""

    def __post_init__(self) -> None:
        self._corpus, self._fine_tuned = self.meta.get("text"), self.meta.get("fine_tuned")
        self._mask = self.tokenizer.tokens[self.tokenizer.mask_id]

    def _metadata(self) -> str:
        from huggingface_hub import EvalResult, ModelCardData

        objective, results = self.config.objective.name, None
        task = "sentence-similarity" if self._fine_tuned else _TASKS[objective]
        if self._corpus and self.result:
            dataset = {"dataset_type": "text", "dataset_name": self._corpus["name"], "dataset_split": "held out"}
            results = [
                EvalResult(task_type=task, metric_type=key, metric_value=round(self.result[key], 4), **dataset)
                for key in ("loss", "accuracy", "bits_per_byte")
                if key in self.result
            ]
        return ModelCardData(
            language=self.language or None,
            license=self.licence or None,
            library_name="sentence-transformers" if self._fine_tuned else "transformers",
            pipeline_tag=task,
            tags=["flax_mlm", objective],
            model_name=self.name,
            eval_results=results,
        ).to_yaml()

    def _use(self) -> str:
        if self._fine_tuned:
            return _VECTORS
        return _USE[self.config.objective.name].replace("MASK", self._mask).replace("VECTORS", _VECTORS)

    def _training(self) -> str:
        """Lists where the weights come from."""
        config, meta, lines = self.config, self.meta, []
        if config.init_from:
            lines.append(f"- Started from: {config.init_from.rstrip('/').rpartition('/')[2]}.")
        if self._corpus:
            lines += self._corpora(self._corpus)
            average = config.optimizer.averages
            averaged = f"; the weights are their {average} average" if average != "none" else ""
            seen = meta.get("totals", {}).get("tokens_seen", 0)
            tokens = f", {seen:,.0f} tokens with the special ones" if seen else ""
            lines += [
                f"- Objective: {self._objective()}.",
                f"- Run: {meta['step']:,} steps of {config.train.global_batch_size} rows of {config.data.seq_len}"
                f"{tokens}; {config.optimizer.name}, peak learning rate {config.optimizer.learning_rate:g}, "
                f"{config.optimizer.schedule}{averaged}; computed in {config.model.dtype}; seed {config.seed}.",
            ]
        if phases := meta.get("config", {}).get("train", {}).get("phases"):
            lines.append(f"- In phases: `{phases}`. The above is of the last one that it has seen.")
        if self._fine_tuned:
            lines.append(
                f"- Fine-tuned for search: contrastive (InfoNCE), {self._fine_tuned['examples']:,} pairs, vectors by "
                f"{config.finetune.pooling} pooling."
            )
        return "\n".join(lines)

    def _corpora(self, about: Mapping[str, Any]) -> list[str]:
        corpora = about.get("corpora", {"": about}).values()
        lines = []
        for text in corpora:
            fraction = f", {text['fraction']:.1%} of the rows" if len(corpora) > 1 else ""
            lines.append(
                f"- Text{fraction}: {text['name']}; {text['documents']:,} documents, {text['words']:,} words, "
                f"{text['tokens']:,} tokens. Its licence: {text['licence']}."
            )
        return lines

    def _objective(self) -> str:
        o, generator = self.config.objective, self.config.generator
        masks = (
            f"{o.mask_rate:.0%} of the tokens, chosen by {o.masking.replace('_', ' ')}, of those "
            f"{o.mask_replace_prob:.0%} shown as `{self._mask}`, {o.random_replace_prob:.0%} as a random token"
        )
        if o.name == "mlm":
            return f"masked-language modelling (mlm): {masks}"
        if o.name == "clm":
            return "causal language modelling (clm)"
        return (
            f"replaced-token detection (rtd, arXiv:2003.10555): {masks}; filled by a generator of "
            f"{generator.num_layers} layers of {generator.hidden_size} with {_SHARING[o.embedding_sharing]}; the "
            f"encoder's loss counts {o.discriminator_weight:g} times"
        )

    def _model(self) -> str:
        m = self.config.model
        return (
            f"- Licence of the model: {self.licence or 'not stated'}.\n"
            f"- Model: {m.num_layers} layers, width {m.hidden_size}, {m.num_heads} heads, MLP {m.intermediate_size}"
            f"{' (GeGLU)' * m.glu}, {m.position_embedding} positions up to {m.max_positions}, {m.norm_position}-norm; "
            f"vocabulary {self.tokenizer.vocab_size:,}."
        )

    def _settings(self) -> str:
        """Returns the config without the sections that may name paths of somebody's machine."""
        sections = ["model", *(("objective", "optimizer", "train") if self._corpus else ())]
        sections += ["finetune"] if self._fine_tuned else []
        config = self.config.to_dict()
        return json.dumps({name: section for name, section in config.items() if name in sections}, indent=1)

    def _evaluation(self) -> str:
        result, objective = self.result, self.config.objective.name
        if not result:
            has_ended = not self._corpus or self._fine_tuned
            return "Not evaluated." if has_ended else "Not evaluated: this is a checkpoint of a run that had not ended."
        predicts = _PREDICTS[objective]
        rows = [
            (f"{predicts}-token loss (nats)", f"{result['loss']:.4f} ± {result['loss_stderr']:.4f}"),
            (f"{predicts}-token accuracy", f"{result['accuracy']:.4f} ± {result['accuracy_stderr']:.4f}"),
        ]
        if objective == "rtd":
            rows += [
                ("recall of replaced tokens", f"{result['recall_replaced']:.4f}"),
                ("recall of original tokens", f"{result['recall_original']:.4f}"),
                ("fraction of tokens replaced", f"{result['replaced']:.4f}"),
                ("masked-token loss of the generator (nats)", f"{result['generator_loss']:.4f}"),
            ]
        else:
            rows += [
                ("perplexity", f"{result['perplexity']:.2f}"),
                ("bits per byte", f"{result['bits_per_byte']:.3f}"),
            ]
        table = "\n".join(f"| {measure} | {value} |" for measure, value in rows)
        count = f"{result['predicted_tokens']:,.0f} predicted tokens"
        return f"On held-out documents of the same text, {count}:\n\n| measure | value |\n|---|--:|\n{table}"
