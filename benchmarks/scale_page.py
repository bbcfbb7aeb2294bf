"""docs/scale.md from benchmarks/results/scale.json."""


def text(result):
    return ""
