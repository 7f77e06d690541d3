"""What importing `envs` does: register the environment, and little else."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import gymnasium as gym

import envs

ID = "rlrag/DocumentSelection-v1"


def test_importing_the_package_loads_no_model_library():
    program = (
        "import sys, envs, gymnasium as gym; gym.make('rlrag/DocumentSelection-v1');"
        "gym.make('rlrag/DocumentHops-v1');"
        "print([n for n in ('torch', 'ray', 'vllm', 'transformers', 'faiss') if n in sys.modules])"
    )
    result = subprocess.run(
        [sys.executable, "-c", program],
        cwd=Path(envs.__file__).parents[1],
        capture_output=True,
        text=True,
        check=True,
        timeout=60,
    )
    assert result.stdout.strip() == "[]"


def test_the_registration_names_both_entry_points():
    spec = gym.spec(ID)
    assert spec.entry_point == "rlrag.environment.document_selection:DocumentSelectionEnv"
    assert spec.vector_entry_point == "rlrag.environment.vector:DocumentSelectionVectorEnv"
    assert spec.max_episode_steps is None


def test_importing_the_package_registers_the_environment_with_hops_too():
    spec = gym.spec("rlrag/DocumentHops-v1")
    assert spec.entry_point == "rlrag.environment.document_hops:DocumentHopsEnv"
    assert spec.vector_entry_point == "rlrag.environment.document_hops:DocumentHopsVectorEnv"
