"""What a checkpoint is measured on. A task has `run(...) -> dict of numbers` and `table(result) -> lines`."""
