"""A step of transformers' model in torch, as its Trainer makes it: fused AdamW, no decay for vectors, gradients clipped
by their global norm; on a GPU in bfloat16 by autocast.
"""

import itertools
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
import transformers

from benchmarks.workers.serving import serve


def build(spec: dict[str, Any]) -> Callable[[], Any]:
    """spec: `folder` of the case; `compile`; `device`; `optimizer`, our config of it; `more` settings of the model."""
    folder, device, settings = Path(spec["folder"]), torch.device(spec["device"]), spec["optimizer"]
    transformers.utils.logging.disable_progress_bar()
    net = transformers.AutoModelForMaskedLM.from_pretrained(folder / "hf", dtype=torch.float32, **spec["more"])
    net = net.to(device).train()
    matrices = [p for p in net.parameters() if p.ndim > 1]
    vectors = [p for p in net.parameters() if p.ndim <= 1]
    optimizer = torch.optim.AdamW(
        [{"params": matrices, "weight_decay": settings["weight_decay"]}, {"params": vectors, "weight_decay": 0.0}],
        lr=settings["learning_rate"],
        betas=(settings["beta1"], settings["beta2"]),
        eps=settings["eps"],
        fused=True,
    )
    forward = torch.compile(net) if spec["compile"] else net
    arrays = np.load(folder / "batches.npz")
    # No attention mask, for there is no padding: with one, compiled code could not take the fastest kernels.
    batches = itertools.cycle(
        {
            "input_ids": torch.tensor(inputs).long().to(device),
            "labels": torch.tensor(labels).long().to(device),
        }
        for inputs, labels in zip(arrays["inputs"], arrays["labels"], strict=True)
    )

    def step() -> Any:
        optimizer.zero_grad()
        with torch.autocast(device.type, torch.bfloat16, enabled=spec["autocast"]):
            loss = forward(**next(batches)).loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_(net.parameters(), settings["max_grad_norm"])
        optimizer.step()
        return loss.item() if device.type == "cpu" else loss.item

    return step


if __name__ == "__main__":
    serve(
        build, ("torch", "transformers"), lambda: torch.cuda.max_memory_allocated() if torch.cuda.is_available() else 0
    )
