"""What to change so that a run fits, how much its adapters can learn, and how fast."""

import copy
import math
from collections.abc import Mapping

import jax
import jax.numpy as jnp
from jax.sharding import Mesh

from lora_jax.models import decoder
from lora_jax.models.config import DecoderConfig
from train import config as settings
from train import programs, topology
from train.forecast import Forecast

BITS_PER_PARAMETER = 2  # that an adapter can hold; "LoRA Without Regret"
BITS_PER_TOKEN = 1  # that are to be learned of a supervised token; the same


def rows_that_fit(
    config: settings.Config,
    shape: DecoderConfig,
    mesh: Mesh,
    dtype: jnp.dtype,
    length: int,
    learned: int,
    forecast: Forecast,
) -> dict[str, int]:
    """How many rows fit on a chip at once, at each tier of remat, by arithmetic from one compiled step.

    What is kept for the backward pass is known of each tier. Of the rest it is taken, to be safe, that it grows with
    the rows and does not shrink with them.

    Args:
      config: of the run that was compiled.
      shape: of the model.
      mesh: of the devices.
      dtype, length, learned: as `programs.training`.
      forecast: of that run.

    Returns:
      `{remat: rows}`, of one of `config.accumulate` parts; 0 where not even one fits.
    """
    now = config.batch_size // config.accumulate / programs.row_parts(mesh)
    free = forecast.room - forecast.state - forecast.bytes["program"]
    fitting = {}
    for remat in decoder.REMAT:
        other = copy.deepcopy(config)
        other.remat = remat
        row, rest = programs.kept(other, shape, length, learned, dtype).device, forecast.bytes["temporaries"]
        fitting[remat] = max(0, math.floor(min((free - rest) / row, max(now, free / (row + rest / now)))))
    return fitting


def changes(config: settings.Config, mesh: Mesh, forecast: Forecast, fitting: Mapping[str, int]) -> str:
    """What to change in a run that does not fit, in one line.

    Args:
      config: of the run.
      mesh: of the devices.
      forecast: of the run.
      fitting: from `rows_that_fit`.
    """
    rows = programs.row_parts(mesh) * config.accumulate
    some = [f"config.remat={remat!r} with config.batch_size={n * rows}" for remat, n in fitting.items() if n]
    if some:
        return " or ".join(some)
    ways, sizes = [], mesh.shape
    if forecast.chips > sizes["fsdp"] * sizes["tensor"] * sizes["expert"]:
        ways.append(f"config.mesh='fsdp={forecast.chips}', which divides the base")
    if config.method == "full":
        ways.append("config.method='lora'")
    elif not config.quantize and forecast.bytes["base"] > forecast.room / 4:
        ways.append("config.quantize='nf4', which leaves about 0.29 of the linear weights")
    if larger := _larger(forecast):
        ways.append(f"--topology={larger}")
    return " or ".join(ways or ["a shorter config.data.length"])


def _larger(forecast: Forecast) -> str:
    """The smallest slice of the same chips among which the peak would fit, if all of it can be divided; "" for none."""
    kind = forecast.topology.partition(":")[0]
    for shape in topology.SHAPES.get(kind, ()):
        chips = math.prod(map(int, shape.split("x")))
        if chips > forecast.chips and forecast.peak * forecast.chips / chips < 0.9 * forecast.room:
            return f"{kind}:{shape}"
    return ""


def capacity(trained: int, tokens: int) -> str:
    """Whether so many trained parameters can hold what so many learned tokens say.

    Source: "LoRA Without Regret" (Schulman and Thinking Machines, 2025): about 2 bits a parameter and 1 bit a token.
    """
    holds, asked = BITS_PER_PARAMETER * trained, BITS_PER_TOKEN * tokens
    said = f"{tokens:,} tokens to learn are about {asked:,} bits; {trained:,} trained parameters hold about {holds:,}"
    if asked <= holds:
        return f"{said}: enough"
    return f"{said}: too few, take {math.ceil(asked / holds)} times the rank"


def trained(program: programs.Program) -> int:
    """How many numbers a training step trains, by their shapes."""
    return sum(math.prod(x.shape) for x in jax.tree.leaves(program.parts["adapters"]))
