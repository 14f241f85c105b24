"""From documents to batches: sources -> tokenizer -> packing -> corpus on disk -> pipeline."""
