"""GSM8K's file of models' solutions, right and wrong, as preference pairs."""

import itertools
from pathlib import Path
from typing import Any

from lora_jax.data import files
from lora_jax.data.files import Record


def solutions(source: str, path: str, parameters: dict[str, Any]) -> list[Record]:
    """The file `model_solutions.jsonl` as preference pairs.

    Every wrong solution makes a pair with a right one: a model's, in turn, or, where none is right, the data set's own.

    Args:
      source: its name for errors.
      path: of the file.
      parameters: there are none.

    Returns:
      Records with prompt, chosen and rejected.

    Raises:
      FileNotFoundError: if there is no such file.
      ValueError: naming a line that is not of this kind.
    """
    if parameters:
        raise ValueError(f"{source}: takes no parameters, so {next(iter(parameters))!r} is none")
    pairs = []
    for record in files.read(Path(path)):
        answers = [value for value in record.values.values() if isinstance(value, dict)]
        texts = (
            record.values.get("question"),
            record.values.get("ground_truth"),
            *(a.get("solution") for a in answers),
        )
        if not answers or not all(isinstance(text, str) for text in texts):
            found = ", ".join(map(repr, record.values))
            raise ValueError(
                f"{record.name}: no 'question', 'ground_truth' and models' 'solution' and 'is_correct'; it has {found}"
            )
        question, truth, *_ = texts
        right = [answer["solution"] for answer in answers if answer.get("is_correct")] or [truth]
        wrong = (answer["solution"] for answer in answers if not answer.get("is_correct"))
        for i, (chosen, rejected) in enumerate(zip(itertools.cycle(right), wrong, strict=False), 1):
            values = {"prompt": question, "chosen": chosen, "rejected": rejected}
            pairs.append(Record(f"{record.name} (wrong solution {i})", values))
    return pairs
