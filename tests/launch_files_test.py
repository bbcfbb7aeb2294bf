"""The files that start several hosts, read by what checks such files, and run with stand-ins for what they call."""

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import kubernetes_validate
import pytest
import yaml

from train import run

FOLDER = Path(__file__).parent.parent / "configs" / "launch"
SHELLCHECK = shutil.which("shellcheck", path=f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}")
XPK = shutil.which("xpk", path=os.pathsep.join([f"{sys.prefix}/xpk/bin", os.environ["PATH"]]))
SCRIPTS = sorted(FOLDER.glob("*.sh"))


@pytest.mark.parametrize("script", SCRIPTS, ids=lambda path: path.name)
def test_scripts_are_clean(script):
    for command in (["bash", "-n"], [SHELLCHECK]):
        done = subprocess.run([*command, script], capture_output=True, text=True)
        assert done.returncode == 0, done.stdout + done.stderr
    assert os.access(script, os.X_OK)


def test_shellcheck_finds_something(tmp_path):
    (tmp_path / "bad.sh").write_text("#!/usr/bin/env bash\nrm $1\n")
    assert subprocess.run([SHELLCHECK, tmp_path / "bad.sh"], capture_output=True).returncode == 1


def started(folder, script, *arguments, status=0, **environment):
    """Runs a script with stand-ins for programs that write down what they are called with; returns that."""
    for name in ("srun", "scontrol", "xpk", "python"):
        stand_in = folder / name
        lines = ["#!/bin/bash", f'printf "%s\\n" "{name}" "$@" >> {folder}/called']
        lines += {"scontrol": ["echo n1"], "srun": ['SLURM_PROCID=5 "$@"', f"exit {status}"]}.get(name, [])
        stand_in.write_text("\n".join(lines) + "\n")
        stand_in.chmod(0o755)
    done = subprocess.run(
        [FOLDER / script, *arguments],
        env={"PATH": f"{folder}:{os.environ['PATH']}", **environment},
        capture_output=True,
        text=True,
    )
    called = (folder / "called").read_text().splitlines() if (folder / "called").exists() else []
    return done, called


SLURM = {"SLURM_JOB_NODELIST": "n[1-2]", "SLURM_JOB_ID": "123", "SLURM_NTASKS": "16"}


@pytest.mark.parametrize("status", [0, run.RESUMABLE, 1])
def test_slurm_starts_every_process_and_again_only_what_was_preempted(tmp_path, status):
    done, called = started(tmp_path, "slurm.sh", "--config=a b.py", status=status, **SLURM)
    assert done.returncode == status, done.stderr
    python = called[called.index("python") + 1 :]
    expected = ["-m", "train.sft", "--process=5", "--coordinator=n1:20123", "--processes=16", "--config=a b.py"]
    assert python[:6] == expected
    assert ("requeue" in called) == (status == run.RESUMABLE)


GIVEN = {"CLUSTER": "c", "PROJECT": "p", "ZONE": "us-east5-b", "IMAGE": "i"}


def test_xpk_is_given_the_command(tmp_path):
    done, called = started(
        tmp_path, "xpk.sh", "sums", "v5litepod-16", "--config=a b.py", "--config.lora.rank=4", **GIVEN
    )
    assert done.returncode == 0, done.stderr
    assert called[:3] == ["xpk", "workload", "create"]
    assert "--command=exec python -m train.sft --config=a\\ b.py --config.lora.rank=4" in called
    assert {
        f"--restart-on-exit-codes={run.RESUMABLE}",
        "--workload=sums",
        "--tpu-type=v5litepod-16",
        "--cluster=c",
        "--docker-image=i",
    } < {*called}
    for name in GIVEN:
        rest = {key: value for key, value in GIVEN.items() if key != name}
        done, _ = started(tmp_path, "xpk.sh", "sums", "v5litepod-16", **rest)
        assert done.returncode and name in done.stderr
    done, _ = started(tmp_path, "xpk.sh", "sums", **GIVEN)
    assert done.returncode and "usage: configs/launch/xpk.sh WORKLOAD TPU_TYPE" in done.stderr


@pytest.mark.slow
@pytest.mark.skipif(XPK is None, reason="needs the program xpk")
def test_xpk_makes_a_jobset_of_it(tmp_path):
    """XPK itself reads the arguments, and in a dry run prints what it would apply."""
    _, (_, *arguments) = started(tmp_path, "xpk.sh", "sums", "v5litepod-16", "--config=a b.py", **GIVEN)

    def asked(*more):
        environment = os.environ | {"HOME": str(tmp_path), "TELEMETRY_ENABLED": "false"}
        return subprocess.run([XPK, *arguments, "--dry-run", *more], env=environment, capture_output=True, text=True)

    done = asked()
    assert done.returncode == 0, done.stdout + done.stderr
    jobset = yaml.safe_load(re.search(r"^apiVersion: .*?(?=^\[XPK\])", done.stdout, re.M | re.S)[0])
    assert jobset["metadata"]["name"] == "sums" and jobset["spec"]["failurePolicy"]["maxRestarts"] == 20
    (replicated,) = jobset["spec"]["replicatedJobs"]
    job = replicated["template"]["spec"]
    assert (replicated["replicas"], job["completions"]) == (1, 4)
    (rule,) = job["podFailurePolicy"]["rules"]  # any other status is a failure
    assert rule["onExitCodes"]["operator"] == "NotIn" and run.RESUMABLE in rule["onExitCodes"]["values"]
    pod = job["template"]["spec"]
    (container,) = pod["containers"]
    assert container["image"] == "i" and pod["terminationGracePeriodSeconds"] == 120
    assert "(exec python -m train.sft --config=a\\ b.py) &" in container["command"][-1]
    refused = asked("--restart-on-exit-status=75")
    assert refused.returncode and "unrecognized arguments: --restart-on-exit-status=75" in refused.stderr


@pytest.fixture
def jobset():
    return yaml.safe_load((FOLDER / "jobset.yaml").read_text())


def test_the_jobset_is_one(jobset):
    assert (jobset["apiVersion"], jobset["kind"]) == ("jobset.x-k8s.io/v1alpha2", "JobSet")
    assert {*jobset["spec"]} == {"failurePolicy", "network", "replicatedJobs"}
    (rule,) = jobset["spec"]["failurePolicy"]["rules"]
    assert rule["name"] and rule["action"] == "RestartJobSetAndIgnoreMaxRestarts"
    assert rule["onJobFailureReasons"] == ["PodFailurePolicy"]
    (replicated,) = jobset["spec"]["replicatedJobs"]
    assert {*replicated} == {"name", "replicas", "template"}


def test_its_job_is_one_of_kubernetes(jobset):
    def validate(template):
        job = {"apiVersion": "batch/v1", "kind": "Job", "metadata": {"name": "lora"}, **template}
        kubernetes_validate.validate(job, kubernetes_validate.latest_version(), strict=True)

    template = jobset["spec"]["replicatedJobs"][0]["template"]
    validate(template)
    template["spec"]["paralelism"] = 4
    with pytest.raises(kubernetes_validate.ValidationError):
        validate(template)


def test_its_numbers_agree(jobset):
    spec = jobset["spec"]["replicatedJobs"][0]["template"]["spec"]
    pod = spec["template"]["spec"]
    (container,) = pod["containers"]
    command = container["args"][0].split()
    chips = container["resources"]["limits"]["google.com/tpu"] * spec["completions"]
    rows, columns = map(int, pod["nodeSelector"]["cloud.google.com/gke-tpu-topology"].split("x"))
    assert spec["parallelism"] == spec["completions"] == 4 and chips == rows * columns
    assert f"--processes={spec['completions']}" in command and f"--config.mesh=fsdp={chips}" in command
    name, job, network = (
        jobset["metadata"]["name"],
        jobset["spec"]["replicatedJobs"][0]["name"],
        jobset["spec"]["network"],
    )
    (port,) = container["ports"]
    address = f"{name}-{job}-0-0.{network['subdomain']}:{port['containerPort']}"
    assert f"--coordinator={address}" in command and network["enableDNSHostnames"]
    (failure,) = spec["podFailurePolicy"]["rules"]
    assert failure["onExitCodes"] == {"containerName": container["name"], "operator": "In", "values": [run.RESUMABLE]}
    assert failure["action"] == "FailJob" and pod["restartPolicy"] == "Never"
    (mount,) = container["volumeMounts"]
    assert any(part.startswith(f"--config.run={mount['mountPath']}/") for part in command)
