"""Language models written in plain Flax NNX and used as functions of a parameter tree."""
