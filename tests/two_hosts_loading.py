"""One of two processes of four devices each that read a model: `safetensors_hosts_test.py` starts them."""

import sys

import jax

if __name__ == "__main__":
    folder, address, host = sys.argv[1:]
    jax.distributed.initialize(address, 2, int(host))

    from lora_jax import sharding
    from lora_jax.interop import safetensors
    from train import config as settings
    from train import methods

    read, tensor = [0], safetensors.Files.tensor

    def counted(self, name, index=None):
        x = tensor(self, name, index)
        read[0] += x.nbytes
        return x

    safetensors.Files.tensor = counted
    config = settings.sft()
    config.model = folder
    with jax.set_mesh(sharding.mesh("fsdp=8")):
        params = methods.load(config, jax.numpy.dtype("float32")).params
        sums = jax.jit(lambda p: [x.sum() for x in jax.tree.leaves(p)])(params)
    held = sum(shard.data.nbytes for x in jax.tree.leaves(params) for shard in x.addressable_shards)
    print("read", read[0], "held", held, "sums", *map(float, sums), flush=True)
