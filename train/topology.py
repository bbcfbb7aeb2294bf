"""The machines that a plan is made for: what a chip holds and does, and the devices that a compiler is given.

No such machine is needed: the compilers for TPU and GPU are packages, and describe devices that are not there.
"""

import importlib.util
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import jax
from jax.experimental import topologies

GIB = 2**30


class Chip(NamedTuple):
    """What one chip holds, and the most it does; 0 where that is not known.

    Attributes:
      name: for people.
      bytes: of its memory, as far as programs can have it.
      flops: per second, bfloat16 products, dense.
      memory: bytes per second that its memory reads or writes.
      links: bytes per second that it can receive from other chips, all links together.
      host: bytes per second to its host's memory, or from it.
      hertz: cycles per second, in which XLA estimates the time of a TPU's instructions.
    """

    name: str
    bytes: int
    flops: float = 0.0
    memory: float = 0.0
    links: float = 0.0
    host: float = 0.0
    hertz: float = 0.0


# Memory is what libtpu leaves to programs. Peaks: Google Cloud's pages of each TPU and NVIDIA's data sheet of the H100
# SXM, PCIe 5 too; TPUs' links, one way, all axes of the torus, and their hosts: "How to Scale Your Model" (Austin et
# al., 2025); clocks: the peak by the products of a cycle.
CHIPS = {
    "v5e": Chip("TPU v5e", int(15.75 * GIB), 197e12, 819e9, 1.8e11, 1.5e10, 1.5e9),
    "v5p": Chip("TPU v5p", int(95.74 * GIB), 459e12, 2765e9, 5.4e11, 1.5e10, 1.75e9),
    "v6e": Chip("TPU v6e", int(31.25 * GIB), 918e12, 1640e9, 3.6e11, 3.2e10, 1.75e9),
    "h100": Chip("NVIDIA H100 80GB", 84942979072, 989e12, 3352e9, 4.5e11, 6.4e10),
}
_FLAT = ("1x1", "2x2", "2x4", "4x4", "4x8", "8x8", "8x16", "16x16")
_CUBES = ("2x2x1", "2x2x2", "2x2x4", "2x4x4", "4x4x4", "4x4x8", "4x8x8", "8x8x8", "8x8x16", "8x16x16")
# Slices of TPUs; of GPUs, how many in a machine, or machines x GPUs.
SHAPES = {"v5e": _FLAT, "v5p": _CUBES, "v6e": _FLAT, "h100": ("1", "2", "4", "8", "2x8", "4x8", "8x8")}
PIP = {
    "libtpu": "pip install libtpu",
    "jax_plugins.xla_cuda12": "pip install --no-deps jax-cuda12-pjrt=={0} jax-cuda12-plugin=={0} "
    "nvidia-cuda-nvcc-cu12 nvidia-nvjitlink-cu12",
}
# What XLA asks to know of an H100 80GB HBM3.
H100 = """
platform_name: "CUDA"
device_description_str: "NVIDIA H100 80GB HBM3"
dnn_version_info { major: 9 minor: 28 }
gpu_device_info {
  cuda_compute_capability { major: 9 }
  core_count: 132
  fpus_per_core: 128
  threads_per_warp: 32
  threads_per_block_limit: 1024
  threads_per_core_limit: 2048
  block_dim_limit_x: 2147483647
  block_dim_limit_y: 65535
  block_dim_limit_z: 65535
  registers_per_core_limit: 65536
  registers_per_block_limit: 65536
  shared_memory_per_block: 49152
  shared_memory_per_block_optin: 232448
  shared_memory_per_core: 233472
  l2_cache_size: 52428800
  memory_bandwidth: 3352320000000
  device_memory_size: 84942979072
  clock_rate_ghz: 1.98
}
"""


class Topology(NamedTuple):
    """Devices to compile for.

    Attributes:
      name: as `devices` takes it.
      chip: what each of them is.
      devices: the compiler's.
      options: that the compiler needs.
      platform: whose kernels of attention it can compile: cuDNN's need a GPU at hand.
    """

    name: str
    chip: Chip
    devices: Sequence[Any]
    options: dict[str, Any]
    platform: str


def get(name: str, target: str = "") -> Topology:
    """The devices of a name.

    Args:
      name: "v5e:4x4" and the like, "h100" for one, "h100:8" for a machine of eight, "h100:2x8" for two machines, or
        "here" for the devices of this machine.
      target: a file with XLA's description of a GPU in place of the H100's.

    Returns:
      The topology. But for "here", no device of this machine is touched.

    Raises:
      ValueError: there is no such topology; with those that there are.
      FileNotFoundError: the file does not exist, or the compiler is not installed; with what to install.
    """
    kind, _, shape = name.partition(":")
    if name == "here":
        return _here()
    if name == "h100":
        shape = "1"
    if shape not in SHAPES.get(kind, ()):
        raise ValueError(f"topology {name!r} does not exist; there are {', '.join(_listed())}")
    if target and kind != "h100":
        raise ValueError(f"a target description is of a GPU, and {name!r} is none")
    jax.config.update("jax_platforms", "cpu")
    if kind == "h100":
        options = {"xla_gpu_autotune_level": 0}  # there is nothing to time on
        return Topology(name, CHIPS[kind], _gpus(shape, target), options, "a GPU that is not there")
    return Topology(name, CHIPS[kind], _tpus(name), {}, "tpu")


def _listed() -> list[str]:
    named = [f"{kind}:{shape}" for kind, shapes in SHAPES.items() for shape in shapes]
    return ["here", *("h100" if name == "h100:1" else name for name in named)]


def _here() -> Topology:
    devices = jax.devices()
    stats = devices[0].memory_stats() or {}
    size = stats.get("bytes_limit") or os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") // len(devices)
    return Topology("here", Chip(devices[0].device_kind, size), devices, {}, jax.default_backend())


def _tpus(name: str) -> Sequence[Any]:
    _installed("libtpu")
    # libtpu is loaded as a compiler: it looks for no machine around it, and shares no chip with other programs.
    os.environ["TPU_SKIP_MDS_QUERY"] = "1"
    os.environ["ALLOW_MULTIPLE_LIBTPU_LOAD"] = "1"
    return topologies.get_topology_desc(name, platform="tpu").devices


def _gpus(shape: str, target: str) -> Sequence[Any]:
    _installed("jax_plugins.xla_cuda12")
    if target and not Path(target).is_file():
        raise FileNotFoundError(f"{target}: no such file; give XLA's description of a GPU, as text")
    machines, _, each = shape.rpartition("x")
    return topologies.get_topology_desc(
        platform="cuda",
        topology_name="h100",
        topology=f"1x{machines or 1}x{each}",
        target_config=Path(target).read_text() if target else H100,
    ).devices


def _installed(module: str) -> None:
    """Refuses to go on without a compiler."""
    package, _, inner = module.partition(".")
    if importlib.util.find_spec(package) is None or (inner and importlib.util.find_spec(module) is None):
        raise FileNotFoundError(
            f"the compiler for this topology is not installed; run: {PIP[module].format(jax.__version__)}"
        )
