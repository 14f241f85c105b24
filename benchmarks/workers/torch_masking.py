"""transformers' masking: DataCollatorForLanguageModeling from lists of ids, and its `torch_mask_tokens` alone."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
import transformers

from benchmarks.workers.serving import seconds_of_calls, serve


def build(spec: dict[str, Any]) -> Callable[[], dict[str, float]]:
    """spec: `folder` with tokens.npy and hf/, a tokenizer; `shapes`, (rows, length); `calls` of each in a step."""
    folder = Path(spec["folder"])
    tokenizer = transformers.AutoTokenizer.from_pretrained(folder / "hf")
    collate = transformers.DataCollatorForLanguageModeling(tokenizer, mlm_probability=0.15)
    stream = np.load(folder / "tokens.npy").reshape(-1).astype(np.int64)

    def of_shape(rows: int, length: int) -> tuple[Callable[[], Any], Callable[[], Any]]:
        tokens = stream[: rows * length].reshape(rows, length)
        lists = [{"input_ids": row} for row in tokens.tolist()]
        ready = torch.tensor(tokens)
        is_special = torch.isin(ready, torch.tensor(tokenizer.all_special_ids))
        # It writes into what it is given, so it is given a copy.
        return lambda: collate(lists), lambda: collate.torch_mask_tokens(ready.clone(), is_special.clone())

    masks = {}
    for rows, length in spec["shapes"]:
        masks[f"{rows}x{length} lists"], masks[f"{rows}x{length} tensor"] = of_shape(rows, length)

    return lambda: seconds_of_calls(masks, spec["calls"])


if __name__ == "__main__":
    serve(build, ("torch", "transformers"))
