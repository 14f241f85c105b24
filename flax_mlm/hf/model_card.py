"""The model card (README.md) of an exported model: use, training, evaluation, limits. Its texts are in `card/`."""

import dataclasses
import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from flax_mlm.config.schema import Config
from flax_mlm.hf.architecture import Architecture
from flax_mlm.storage import hub

_TASKS = {"mlm": "fill-mask", "clm": "text-generation", "rtd": "feature-extraction"}
_PIPELINES = {"classification": "text-classification", "tagging": "token-classification"}
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

    def __post_init__(self) -> None:
        self.objective = self.config.objective.name
        self.corpus = self.meta.get("text")
        self.fine_tuned: Any = self.meta.get("fine_tuned")
        self.task = (self.fine_tuned or {}).get("task", "")
        self.mask = self.tokenizer.tokens[self.tokenizer.mask_id]

    def text(self) -> str:
        """Returns the whole card."""
        kind, limit = "An encoder", "It understands rather than writes."
        if self.fine_tuned:
            kind = f"A fine-tuned encoder for {self.task}" if self.task else "An encoder of texts"
        if self.objective == "clm":
            kind, limit = "A causal language model", "What it writes may be false."
        text = self._fill(
            "card",
            metadata=self._metadata(),
            kind=kind,
            origin="pretrained" if self.corpus else "written",
            use=self._use(),
            training="\n".join(self._training()),
            stated_licence=self.licence or "not stated",
            glu=" (GeGLU)" if self.config.model.glu else "",
            settings=self._settings(),
            evaluation=self._evaluation(),
            limit=limit,
        )
        return f"{text}\n"

    def _use(self) -> str:
        """Returns how the model is used from Python."""
        if not self.task:
            return self._fill("use_fine_tuned" if self.fine_tuned else f"use_{self.objective}")
        argument = '"one text"' if not self.fine_tuned["pairs"] else '{"text": "one text", "text_pair": "another"}'
        return self._fill("use_task", pipeline=_PIPELINES[self.task], argument=argument)

    def _fill(self, template: str, **values: Any) -> str:
        """Fills in a file of `card/`; `values` are added to the fields of the card."""
        text = Path(__file__).with_name("card").joinpath(f"{template}.md").read_text(encoding="utf8")
        return text.rstrip("\n").format_map({**vars(self), **values})

    def _metadata(self) -> str:
        from huggingface_hub import EvalResult, ModelCardData

        start = hub.parse("init_from", self.config.init_from)
        task, results = "sentence-similarity" if self.fine_tuned else _TASKS[self.objective], None
        task = _PIPELINES.get(self.task, task)
        if self.corpus and self.result:
            dataset = {"dataset_type": "text", "dataset_name": self.corpus["name"], "dataset_split": "held out"}
            results = [
                EvalResult(task_type=task, metric_type=key, metric_value=round(self.result[key], 4), **dataset)
                for key in ("loss", "accuracy", "bits_per_byte")
                if key in self.result
            ]
        return ModelCardData(
            language=self.language or None,
            license=self.licence or None,
            library_name="sentence-transformers" if self.fine_tuned and not self.task else "transformers",
            pipeline_tag=task,
            base_model=start.repository if start else None,
            tags=["flax_mlm", self.objective],
            model_name=self.name,
            eval_results=results,
        ).to_yaml()

    def _training(self) -> Iterator[str]:
        """Lists where the weights come from."""
        config, meta, average = self.config, self.meta, self.config.optimizer.averages
        if config.init_from:
            start = hub.parse("init_from", config.init_from)
            yield f"- Started from: {start or config.init_from.rstrip('/').rpartition('/')[2]}."
        if self.corpus:
            corpora = self.corpus.get("corpora", {"": self.corpus}).values()
            for text in corpora:
                fraction = f", {text['fraction']:.1%} of the rows" if len(corpora) > 1 else ""
                size = f"{text['documents']:,} documents, {text['words']:,} words, {text['tokens']:,} tokens"
                yield f"- Text{fraction}: {text['name']}; {size}. Its licence: {text['licence']}."
            seen = meta.get("totals", {}).get("tokens_seen", 0)
            yield self._fill(
                f"training_{self.objective}",
                masking=config.objective.masking.replace("_", " "),
                sharing=_SHARING[config.objective.embedding_sharing],
                tokens=f", {seen:,.0f} tokens with the special ones" if seen else "",
                averaged=f"; the weights are their {average} average" if average != "none" else "",
            )
        if phases := meta.get("config", {}).get("train", {}).get("phases"):
            yield f"- In phases: `{phases}`. The above is of the last one that it has seen."
        if self.task:
            labels = ", ".join(self.fine_tuned["labels"][:20]) or "a number"
            examples = f"{self.fine_tuned['examples']:,} examples: " if "examples" in self.fine_tuned else ""
            yield f"- Fine-tuned for {self.task}: {examples}{self.fine_tuned['problem_type']}, {labels}."
        elif self.fine_tuned:
            pairs = f"{self.fine_tuned['examples']:,} pairs, vectors by {config.finetune.pooling} pooling"
            yield f"- Fine-tuned for search: contrastive (InfoNCE), {pairs}."

    def _settings(self) -> str:
        """Returns the config without the sections that may name paths of somebody's machine."""
        sections = {"model", *(("objective", "optimizer", "train") if self.corpus else ())}
        sections |= {"finetune"} if self.fine_tuned else set()
        config = self.config.to_dict()
        return json.dumps({name: section for name, section in config.items() if name in sections}, indent=1)

    def _evaluation(self) -> str:
        if self.result:
            return self._fill(f"result_{self.objective}", **self.result)
        has_ended = not self.corpus or self.fine_tuned
        return "Not evaluated." if has_ended else "Not evaluated: this is a checkpoint of a run that had not ended."
