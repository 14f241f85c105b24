"""transformers' own training of a masked language model: its Trainer, its collator and a BertForMaskedLM of its default
settings, for as many steps as fit in a given time; AdamW, and a learning rate that falls linearly to 0 by the last.

    python -m benchmarks.workers.trainer SPEC > lines     # JSON: {"step", "seconds", "loss", "accuracy"}

The last line has `loss_of_blocks`, too, of held-out text that was cut as that for training is. Seconds are of training
alone, without evaluations and start.
"""

import json
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
import torch
import transformers

_TIMED, _WARM = 100, 20  # steps that are timed before, to know how many fit; and of these, left out


class Blocks(torch.utils.data.Dataset):
    """Blocks of ids, as `group_texts` of run_mlm.py makes them."""

    def __init__(self, blocks_NL: np.ndarray):
        self._blocks = blocks_NL

    def __len__(self) -> int:
        return len(self._blocks)

    def __getitem__(self, i: int) -> dict[str, torch.Tensor]:
        return {"input_ids": torch.from_numpy(self._blocks[i].astype(np.int64))}


def held_out(net: Any, questions: Any) -> dict[str, float]:
    """Mean loss and accuracy of the hidden tokens."""
    questions = dict(questions)  # an archive would be read at every look
    net.eval()
    loss = correct = count = 0.0
    with torch.no_grad():
        for begin in range(0, len(questions["inputs"]), 64):
            inputs, labels, real = (
                torch.from_numpy(questions[name][begin : begin + 64].astype(np.int64))
                for name in ("inputs", "labels", "real")
            )
            hidden = labels >= 0
            scores = net(input_ids=inputs, attention_mask=real).logits[hidden]
            loss += float(torch.nn.functional.cross_entropy(scores, labels[hidden], reduction="sum"))
            correct += float((scores.argmax(-1) == labels[hidden]).sum())
            count += int(hidden.sum())
    net.train()
    return {"loss": loss / count, "accuracy": correct / count}


class Clock(transformers.TrainerCallback):
    """Evaluates every so often, off the clock."""

    def __init__(self, folder: Path | None, every: float):
        self._folder, self._every = folder, every
        self.seconds, self._next, self._since = 0.0, every, 0.0
        self.times: list[float] = []

    def on_step_begin(self, *_: Any, **__: Any) -> None:
        self._since = self._since or time.perf_counter()

    def on_step_end(self, args: Any, state: Any, control: Any, model: Any = None, **_: Any) -> None:
        now = time.perf_counter()
        self.times.append(now - self._since)
        self.seconds, self._since = self.seconds + now - self._since, now
        is_last = state.global_step == state.max_steps
        if self._folder and (is_last or self.seconds >= self._next):
            found = held_out(model, np.load(self._folder / "rows.npz"))
            if is_last:
                found["loss_of_blocks"] = held_out(model, np.load(self._folder / "blocks.npz"))["loss"]
            print(json.dumps({"step": state.global_step, "seconds": self.seconds, **found}), flush=True)
            self._next += self._every
        self._since = time.perf_counter()


def trainer(spec: dict[str, Any], steps: int, clock: Clock) -> transformers.Trainer:
    folder = Path(spec["folder"])
    tokenizer = transformers.AutoTokenizer.from_pretrained(folder / "tokenizer")
    config = transformers.BertConfig(**spec["bert"], vocab_size=len(tokenizer), pad_token_id=tokenizer.pad_token_id)
    transformers.set_seed(spec["seed"])
    made = transformers.Trainer(
        model=transformers.BertForMaskedLM(config),
        args=transformers.TrainingArguments(
            output_dir=spec["scratch"],
            per_device_train_batch_size=spec["rows"],
            learning_rate=spec["learning_rate"],
            lr_scheduler_type="linear",
            warmup_steps=max(1, steps // 20),
            weight_decay=0.01,
            max_steps=steps,
            save_strategy="no",
            report_to=[],
            disable_tqdm=True,
            logging_strategy="no",
            use_cpu=True,
            seed=spec["seed"],
        ),
        data_collator=transformers.DataCollatorForLanguageModeling(tokenizer, mlm_probability=0.15),
        train_dataset=Blocks(np.load(folder / "blocks.npy", mmap_mode="r")),
        callbacks=[clock],
    )
    made.remove_callback(transformers.PrinterCallback)  # what is printed are our lines
    return made


def main() -> None:
    spec = json.loads(sys.argv[1])
    timed = Clock(None, float("inf"))
    trainer(spec, _TIMED, timed).train()
    steps = max(2, round(spec["seconds"] / float(np.mean(timed.times[_WARM:]))))
    trainer(spec, steps, Clock(Path(spec["folder"]), spec["every"])).train()


if __name__ == "__main__":
    main()
