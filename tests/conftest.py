"""Settings for every test: they run on the CPU, offline."""

import os

os.environ.setdefault("JAX_PLATFORMS", "cpu")
os.environ.setdefault("TPU_SKIP_MDS_QUERY", "1")
os.environ.setdefault(
    "ALLOW_MULTIPLE_LIBTPU_LOAD", "1"
)  # compilers only: pytest's workers and other programs share no chip
os.environ.setdefault("HF_HUB_OFFLINE", "1")

import jax
import pytest
import tiny

# Where XLA still has its older emitters of fusions, they compile small programs faster, to the same FLOPs and memory.
# XLA reads its flags once, here: runs in processes of their own are compiled as ever.
if jax.__version_info__ < (0, 11):
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("XLA_FLAGS", f"{os.environ.get('XLA_FLAGS', '')} --xla_cpu_use_fusion_emitters=false")
        jax.devices()


@pytest.fixture
def quick():
    """XLA without most of its optimisations: compiling is most of what a small test costs."""
    with tiny.quick_compilation():
        yield


@pytest.fixture(scope="module")
def quick_module():
    """The same for whole files, whose fixtures compile as well."""
    with tiny.quick_compilation():
        yield


@pytest.fixture(scope="session")
def model(tmp_path_factory):
    """The folder of a tiny Llama; nobody writes into it."""
    return tiny.write(tmp_path_factory.mktemp("model"))


@pytest.fixture
def strict(quick):
    """No silent promotion of ranks or dtypes: the library must not lean on either."""
    with jax.numpy_rank_promotion("raise"), jax.numpy_dtype_promotion("strict"):
        yield


@pytest.fixture
def key():
    """A PRNG key."""
    return jax.random.key(0)


@pytest.fixture(autouse=True, scope="module")
def cleared():
    """A file's programs go with it: each is mapped into memory a few times, and Linux gives a process 65,530 maps."""
    yield
    jax.clear_caches()
