"""The files in deploy/ name what there is, fit each other, and do what their comments say."""

from __future__ import annotations

import os
import re
import shlex
import signal
import subprocess
import time
import tomllib
from pathlib import Path

import pytest
import yaml
from ray.serve.schema import ServeDeploySchema

from rlrag.cli import train
from rlrag.cli.doctor.packages import extras_of
from rlrag.recipes import RECIPES
from rlrag.serving.settings import parse_settings

ROOT = Path(__file__).parents[1]
DEPLOY = ROOT / "deploy"


def manifest(name: str) -> dict:
    return yaml.safe_load((DEPLOY / name).read_text())


@pytest.mark.parametrize("name", ["rayjob.yaml", "rayservice.yaml"])
def test_every_mount_has_its_volume_and_every_node_runs_the_pinned_ray(name):
    spec = manifest(name)["spec"]
    cluster = spec.get("rayClusterSpec") or spec["rayClusterConfig"]
    pinned = re.search(r"^ray==(\S+)$", (ROOT / "constraints.txt").read_text(), re.MULTILINE)
    assert pinned is not None
    assert cluster["rayVersion"] == pinned[1]
    groups = [cluster["headGroupSpec"], *cluster["workerGroupSpecs"]]
    for pod in (group["template"]["spec"] for group in groups):
        (container,) = pod["containers"]
        volumes = {volume["name"] for volume in pod["volumes"]}
        assert {mount["name"] for mount in container["volumeMounts"]} <= volumes
        limits = container["resources"]["limits"]
        assert container["resources"]["requests"]["memory"] == limits["memory"]


def test_the_training_job_is_a_command_that_runs(capsys, tmp_path):
    words = shlex.split(manifest("rayjob.yaml")["spec"]["entrypoint"])
    assert words[:3] == ["python", "-m", "jobs.train"]
    local = [word.replace("/shared", str(tmp_path)) for word in words[3:]]
    train.main([*local, "--dry-run", "True"])
    assert "quickstart: trains selector" in capsys.readouterr().out


def test_the_service_fits_its_cluster():
    spec = manifest("rayservice.yaml")["spec"]
    found = ServeDeploySchema.model_validate(yaml.safe_load(spec["serveConfigV2"]))
    (application,) = found.applications
    assert application.import_path == "serve.app:build"
    settings = parse_settings(application.args)
    assert settings.access.keys_file
    (group,) = spec["rayClusterConfig"]["workerGroupSpecs"]
    (worker,) = group["template"]["spec"]["containers"]
    cpus = group["replicas"] * float(worker["resources"]["requests"]["cpu"])
    parts = [settings.generator, settings.retriever, settings.selector, settings.ingress]
    engines = settings.generator.num_replicas * settings.generator.num_cpus
    assert engines + sum(part.num_replicas * part.num_cpus for part in parts) <= cpus


def test_the_image_copies_what_there_is_and_installs_extras_that_exist():
    text = (DEPLOY / "Dockerfile").read_text()
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    allowed = {
        line[1:] for line in (ROOT / ".dockerignore").read_text().splitlines() if line[:1] == "!"
    }
    copied = {
        name for line in re.findall(r"^COPY (.+) \S+$", text, re.MULTILINE) for name in line.split()
    }
    assert copied == allowed
    assert all((ROOT / name).exists() for name in copied)
    for extras in re.findall(r'"\.\[([\w,-]+)\]"', text):
        assert set(extras.split(",")) <= set(project["optional-dependencies"])
    pinned = re.search(r"^UV_VERSION := (\S+)$", (ROOT / "Makefile").read_text(), re.MULTILINE)
    assert pinned is not None
    assert set(re.findall(r"uv==(\S+)", text)) == {pinned[1]}


@pytest.mark.parametrize("target", ["cpu", "cuda"])
def test_the_image_has_what_every_recipe_needs(target):
    """Also those of the papers start from the built-in encoder, which is a package."""
    stages = re.split(r"^FROM ", (DEPLOY / "Dockerfile").read_text(), flags=re.MULTILINE)
    (stage,) = (text for text in stages if text.partition("\n")[0].endswith(f" AS {target}"))
    (installed,) = re.findall(r'"\.\[([\w,-]+)\]"', stage)
    on_gpu = {"device": "cuda", "gpus_per_actor": 1} if target == "cuda" else {}
    for make in RECIPES.values():
        recipe = make()
        config = recipe.model_copy(update={"generator": recipe.generator.model_copy(update=on_gpu)})
        if target == "cuda" or not config.generator.gpus_per_actor:
            # Ray comes with either build of vLLM.
            assert set(extras_of(config)) <= {"ray", *installed.split(",")}, config.recipe


def test_wherever_ray_is_started_it_asks_for_a_token():
    texts = {
        path.relative_to(ROOT).as_posix(): path.read_text()
        for path in [ROOT / "README.md", *(ROOT / "docs").rglob("*.md"), *DEPLOY.rglob("*.*")]
        if path.suffix in (".md", ".yaml", ".sh")
    }
    starts = {name for name, text in texts.items() if "ray start --head\n" in text}
    assert {"README.md", "deploy/serve-cpu.yaml", "deploy/serve-gpu.yaml"} <= starts
    for name in starts:
        before = texts[name].partition("ray start --head\n")[0]
        block = before[-500:]
        assert "export RAY_AUTH_MODE=token" in block, name
        assert "ray get-auth-token --generate" in block, name
    for name in ("rayjob.yaml", "rayservice.yaml"):
        spec = manifest(name)["spec"]
        cluster = spec.get("rayClusterSpec") or spec["rayClusterConfig"]
        assert cluster["authOptions"] == {"mode": "token"}
    for name, text in texts.items():
        assert not re.search(r"http://HEAD:8265|dashboard-host[= ]0\.0\.0\.0", text), name


@pytest.fixture
def allocation(tmp_path: Path) -> dict[str, str]:
    """A folder with programs of Slurm's and Ray's names that act on one machine."""
    programs = tmp_path / ".venv" / "bin"
    programs.mkdir(parents=True)
    (programs / "activate").write_text(f'PATH="{programs}:$PATH"\n')
    scripts = {
        "scontrol": 'if [ "$1" = show ]; then echo localhost; else echo "$@" >>asked; fi',
        "srun": 'exec "$@"',
        # Of `ray symmetric-run ... -- COMMAND` only the command; the token needs no answer.
        "ray": 'while [ "$#" -gt 0 ] && [ "$1" != -- ]; do shift; done; shift || exit 0; "$@"',
        "python": 'echo "$RAY_ADDRESS $@" >>ran; . ./what_it_does',
    }
    for name, script in scripts.items():
        (programs / name).write_text(f"#!/usr/bin/env bash\n{script}\n")
        (programs / name).chmod(0o755)
    return {
        **os.environ,
        "SLURM_JOB_NODELIST": "node[1-2]",
        "SLURM_JOB_NUM_NODES": "2",
        "SLURM_JOB_ID": "17",
    }


def run_on_slurm(folder: Path, environment: dict[str, str], does: str) -> subprocess.Popen:
    """A job whose run does this; `started` says that the run, or what it waits for, has begun."""
    (folder / "what_it_does").write_text(does)
    return subprocess.Popen(
        [str(DEPLOY / "slurm.sh"), "nq", "--run-dir", "/shared/my run"],
        cwd=folder,
        env=environment,
    )


def test_slurm_runs_the_command_and_passes_its_code_on(tmp_path, allocation):
    assert run_on_slurm(tmp_path, allocation, "exit 3").wait(60) == 3
    assert (tmp_path / "ran").read_text() == (
        "127.0.0.1:6379 -m jobs.train nq --run-dir /shared/my run\n"
    )
    assert not (tmp_path / "asked").exists()


def stop_once_started(job: subprocess.Popen, folder: Path) -> int:
    """The code that a job ends with after SIGTERM."""
    end = time.monotonic() + 60
    while not (folder / "started").exists():
        assert time.monotonic() < end
        time.sleep(0.05)
    job.send_signal(signal.SIGTERM)
    return job.wait(60)


def test_slurm_stops_a_run_in_time_and_queues_it_again(tmp_path, allocation):
    waits = "trap 'exit 75' TERM; touch started; while :; do sleep 0.1; done"
    assert stop_once_started(run_on_slurm(tmp_path, allocation, waits), tmp_path) == 75
    assert (tmp_path / "asked").read_text() == "requeue 17\n"


def test_slurm_queues_a_job_again_that_is_stopped_before_its_run_begins(tmp_path, allocation):
    ray = tmp_path / ".venv" / "bin" / "ray"
    ray.write_text('#!/bin/sh\n[ "$1" != symmetric-run ] || { touch started; exec sleep 300; }\n')
    assert stop_once_started(run_on_slurm(tmp_path, allocation, "exit 3"), tmp_path) == 75
    assert (tmp_path / "asked").read_text() == "requeue 17\n"
    assert not (tmp_path / "ran").exists()


def test_slurm_passes_the_code_of_a_run_on_that_ended_before_the_signal(tmp_path, allocation):
    """Ray is still being taken down: the process that the signal is for is gone."""
    ray = tmp_path / ".venv" / "bin" / "ray"
    down = "touch started; sleep 2; exit 0"
    ray.write_text(ray.read_text().replace('"$@"', f'"$@"; {down}'))
    assert stop_once_started(run_on_slurm(tmp_path, allocation, "exit 0"), tmp_path) == 0
    assert not (tmp_path / "asked").exists()


def test_slurm_wants_a_recipe(tmp_path, allocation):
    job = subprocess.run(
        [str(DEPLOY / "slurm.sh")], env=allocation, capture_output=True, text=True, timeout=60
    )
    assert job.returncode == 2
    assert job.stderr.startswith("error: name a recipe")
