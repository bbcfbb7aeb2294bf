"""How hosts wait for each other: all come, one does not, the first does not, and a stranger does."""

import concurrent.futures
import socket
import time

import pytest
from absl import flags
from absl.testing import flagsaver
from jax._src.clusters import cloud_tpu_cluster

from train import hosts, meeting


@pytest.fixture
def port():
    with socket.socket() as free:
        free.bind(("", 0))
        return free.getsockname()[1]


def meet(port, numbers, count, seconds=1.0):
    """What each of some hosts is told: None that all are there."""

    def one(number):
        try:
            return meeting.wait(f"localhost:{port}", count, number, seconds)
        except TimeoutError as error:
            return str(error)

    with concurrent.futures.ThreadPoolExecutor(len(numbers)) as threads:
        return list(threads.map(one, numbers))


def test_all_come(port):
    assert meet(port, [3, 1, 0, 2], 4, 30) == [None] * 4
    with socket.create_server(("", port)):  # it is free for JAX's service
        pass


def test_who_does_not_come_is_named_everywhere(port):
    said = meet(port, [0, 2], 4)
    assert said[0] == said[1]
    assert f"waited 1 s at localhost:{port} for 4 hosts, but not for host 1, host 3: start it" in said[0]


def test_without_the_first(port):
    begun = time.monotonic()
    (said,) = meet(port, [1], 2)
    assert "but not for host 0" in said and "\n" not in said and 0.9 < time.monotonic() - begun < 20


def test_a_stranger_is_no_host(port):
    def strange():
        for word in (b"GET / HTTP/1.1\r\n\r\n", b"7", b""):
            with socket.create_connection(("localhost", port)) as first:
                first.sendall(word)

    with concurrent.futures.ThreadPoolExecutor(2) as threads:
        told = threads.submit(meet, port, [0], 2, 5)
        time.sleep(0.5)
        strange()
        with socket.create_connection(("localhost", port)) as first:
            first.sendall(b"1")
            assert first.recv(10) == meeting.GO
        assert told.result() == [None]


@pytest.mark.parametrize("address", ["host0", "host0:", ":1234", "host0:http"])
def test_an_address_has_a_port(address):
    with pytest.raises(ValueError, match="give the first host and a free port of it, such as host0:1234"):
        meeting.wait(address, 2, 0, 1)


def test_what_a_cluster_says():
    assert not hosts._detected({"SLURM_NTASKS": "4"})  # a batch script itself
    assert not hosts._detected({"SLURM_STEP_NODELIST": "n1", "SLURM_NTASKS": "1"})
    assert hosts._detected({"SLURM_STEP_NODELIST": "n[1-4]", "SLURM_NTASKS": "4"})
    assert hosts._detected({"TPU_WORKER_HOSTNAMES": "a,b"}) and not hosts._detected(
        {"TPU_WORKER_HOSTNAMES": "localhost"}
    )
    assert hosts._detected({"MEGASCALE_COORDINATOR_ADDRESS": "a"}) and hosts._detected(
        {"JAX_COORDINATOR_ADDRESS": "a:1"}
    )
    assert not hosts._detected({})


SLURM = {
    "SLURM_JOB_ID": "7",
    "SLURM_STEP_NODELIST": "localhost",
    "SLURM_NTASKS": "2",
    "SLURM_PROCID": "0",
    "SLURM_LOCALID": "0",
}
NO_SLICES = dict.fromkeys(["MEGASCALE_COORDINATOR_ADDRESS", "MEGASCALE_NUM_SLICES", "MEGASCALE_SLICE_ID"], "")
GKE = {"TPU_WORKER_HOSTNAMES": "localhost,other", "TPU_WORKER_ID": "0"} | NO_SLICES
SLICES = {"MEGASCALE_COORDINATOR_ADDRESS": "localhost:8080", "MEGASCALE_NUM_SLICES": "3", "MEGASCALE_SLICE_ID": "2"}


@pytest.fixture
def environment(monkeypatch):
    """Sets a cluster's variables, of a machine with TPUs; flags are as they come."""
    if not flags.FLAGS.is_parsed():
        flags.FLAGS(["train"])
    monkeypatch.setattr(cloud_tpu_cluster, "running_in_cloud_tpu_vm", True)
    monkeypatch.setenv("TPU_SKIP_MDS_QUERY", "1")

    def variables(**values):
        for name, value in values.items():
            monkeypatch.setenv(name, value)

    return variables


@pytest.mark.parametrize(
    ("variables", "given", "found"),
    [
        (SLURM, (), ("localhost:61447", 2, 0)),
        (SLURM | {"SLURM_STEP_NODELIST": "n[07-12],m3", "SLURM_PROCID": "1"}, (), ("n07:61447", 2, 1)),
        (SLURM | {"JAX_COORDINATOR_PORT": "123"}, (), ("localhost:123", 2, 0)),
        (SLURM, ("a:1", 0, 1), ("a:1", 2, 1)),  # flags count more
        (GKE, (), ("localhost:8482", 2, 0)),
        (GKE | SLICES, (), ("localhost:8482", 6, 4)),
        ({"JAX_COORDINATOR_ADDRESS": "a:1"}, ("", 2, 1), ("a:1", 2, 1)),
        ({"JAX_COORDINATOR_ADDRESS": "a:1"}, (), ("a:1", None, None)),
        ({}, (), (None, None, None)),
    ],
)
def test_what_flags_leave_open_the_environment_says(environment, variables, given, found):
    environment(**variables)
    assert hosts._found(*(given or ("", 0, -1))) == found


@pytest.mark.parametrize("variables", [SLURM, GKE])
def test_who_does_not_come_is_named_when_a_cluster_says_who_there_is(environment, port, variables):
    environment(JAX_COORDINATOR_PORT=str(port), **variables)
    message = f"waited 1 s at localhost:{port} for 2 hosts, but not for host 1: start it"
    with flagsaver.flagsaver(arrival=1), pytest.raises(TimeoutError, match=message):
        hosts.join()


def test_a_first_host_without_a_name_yet(environment):
    environment(**GKE | {"TPU_WORKER_HOSTNAMES": "nobody.invalid,localhost"})
    with (
        flagsaver.flagsaver(arrival=1),
        pytest.raises(ValueError, match=r"\(.*nobody.invalid\); start all of them, or give --coordinator"),
    ):
        hosts.join()


@pytest.mark.parametrize(
    ("given", "message"),
    [
        (
            {"processes": 2},
            r"several hosts cannot begin \(.*\); start all of them, or give --coordinator, --processes, --process",
        ),
        (
            {"coordinator": "host0:1", "processes": 2, "process": 2},
            "--process=2: with --processes=2 it is one of 0",
        ),
        ({"coordinator": "host0", "processes": 2, "process": 1}, "--coordinator=host0: give the first host and a free"),
    ],
)
def test_flags_that_say_half_of_it(given, message):
    if not flags.FLAGS.is_parsed():
        flags.FLAGS(["train"])
    with flagsaver.flagsaver(**given), pytest.raises(ValueError, match=message):
        hosts.join()


def test_one_host_is_everything():
    assert hosts.first() and not hosts.several() and hosts.part(8) == slice(0, 8)
    hosts.agree({"a": 1}, "")
    hosts.leave()


def test_whose_error_it_is(monkeypatch):
    """What Gloo says of a host that was killed in a step, and Orbax of one that was in a save."""
    gloo = "UNKNOWN: Gloo AllGather failed: Read error [127.0.0.1]:6019: Connection reset by peer"
    orbax = "6: the checkpoint cannot be written (Timed out while waiting for async_write_complete barrier.)"
    assert not hosts.lost(ValueError(gloo))  # there is no other host
    monkeypatch.setattr(hosts, "several", lambda: True)
    assert hosts.lost(ValueError(gloo)) and hosts.lost(OSError(orbax))
    assert not hosts.lost(ValueError("config.steps=0")) and not hosts.lost(RuntimeError("RESOURCE_EXHAUSTED: memory"))
