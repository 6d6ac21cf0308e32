"""From the user's files to micro-batches: sources -> tokenizer -> tokens on disk -> packing -> batches."""
