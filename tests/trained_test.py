"""What a run has trained: one checkpoint of it, the same for every script."""

import jax
import numpy as np
import pytest
import tiny_run

from lora_jax import checkpoint
from lora_jax.interop import hf
from train import loop, source, trained

pytestmark = pytest.mark.usefixtures("quick")


@pytest.mark.parametrize("scored", [True, False])
def test_the_best_checkpoint_counts_where_there_is_one(scored, model, tmp_path, capsys):
    folder = tmp_path / "run"
    base, adapters, _ = tiny_run.write(folder, model)  # step 6, which was not evaluated
    earlier = tiny_run.moved(adapters)
    with checkpoint.Checkpoints(folder / "checkpoints", {"base": checkpoint.fingerprint(base)}) as saved:
        saved.save(checkpoint.State(2, earlier, {}, {}), score=-1.0 if scored else None)
    (folder / loop.METRICS).write_text(
        "".join(f'{{"step": {step}, "heldout_loss": {loss}}}\n' for step, loss in ((0, 3.5), (2, 0.5), (6, 0.75)))
    )
    step, which = (2, "the best") if scored else (6, "the newest")
    tree = trained.load(folder, hf.load(model))
    found = source.read(folder)
    assert capsys.readouterr().out.splitlines() == found.notes == [f"{folder}: step {step}, {which} of its checkpoints"]
    assert found.card.steps == step and found.card.losses["held-out loss after"] == {2: 0.5, 6: 0.75}[step]
    for one in (tree.adapters, found.adapters):
        for got, want, other in zip(*map(jax.tree.leaves, (one, earlier, adapters)), strict=True):
            np.testing.assert_array_equal(got, want if scored else other)
            assert not np.array_equal(want, other)
