"""Types of GGUF tensors that no Python code writes are dequantised number by number as their layout says."""

import gguf
import numpy as np
import pytest

from lora_jax.interop import gguf as reader

ROWS, BLOCKS, WIDTH = 3, 2, 256
# Bytes of a block, and where its half-precision scales begin.
LAYOUTS = {"Q4_K": (144, [0, 2]), "Q5_K": (176, [0, 2]), "Q6_K": (210, [208])}


def half(block, start):
    return float(block[start : start + 2].view(np.float16)[0])


def scale_and_minimum(packed, i):
    """The i-th of eight pairs of six bits in twelve bytes."""
    if i < 4:
        return packed[i] & 63, packed[i + 4] & 63
    low, high = packed[i + 4] & 15, packed[i + 4] >> 4
    return low | (packed[i - 4] >> 6) << 4, high | (packed[i] >> 6) << 4


def number(kind, block, n):
    """The n-th number of a block of 256."""
    byte = [int(b) for b in block]
    if kind == "Q6_K":
        chunk, quarter, at = n // 128, n % 128 // 32, n % 32
        low = byte[64 * chunk + 32 * (quarter % 2) + at] >> (0 if quarter < 2 else 4) & 15
        high = byte[128 + 32 * chunk + at] >> (2 * quarter) & 3
        scale = int(block[192 + 8 * chunk + 2 * quarter + at // 16].view(np.int8))
        return half(block, 208) * scale * ((low | high << 4) - 32)
    group, at = n // 32, n % 32
    scale, minimum = scale_and_minimum(byte[4:16], group)
    fifth = (byte[16 + at] >> group & 1) << 4 if kind == "Q5_K" else 0
    start = 48 if kind == "Q5_K" else 16
    low = byte[start + 32 * (group // 2) + at] >> (4 * (group % 2)) & 15
    return half(block, 0) * scale * (low + fifth) - half(block, 2) * minimum


@pytest.mark.parametrize("kind", LAYOUTS)
def test_k_quants(tmp_path, kind):
    size, scales = LAYOUTS[kind]
    rng = np.random.default_rng(0)
    raw = rng.integers(0, 256, (ROWS, BLOCKS, size), np.uint8)
    for start in scales:
        raw[..., start : start + 2] = rng.uniform(0.1, 1, (ROWS, BLOCKS, 1)).astype(np.float16).view(np.uint8)
    writer = gguf.GGUFWriter(tmp_path / "model.gguf", "llama")
    writer.add_tensor("w", raw.reshape(ROWS, -1), raw_dtype=gguf.GGMLQuantizationType[kind])
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    ours = reader.File(tmp_path / "model.gguf").tensor("w")
    want = [[[number(kind, block, n) for n in range(WIDTH)] for block in row] for row in raw]
    np.testing.assert_allclose(ours, np.reshape(want, (ROWS, BLOCKS * WIDTH)), rtol=1e-5, atol=1e-4)
    assert np.abs(ours[0] - ours[1]).max() > 1
