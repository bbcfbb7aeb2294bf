"""Training data: sources of examples, chat rendering, fixed-length batches."""
