"""Configurations and data that several tests share."""

from __future__ import annotations

import os
import signal
import socket
from collections.abc import Iterator
from pathlib import Path

import pytest
from hypothesis import settings
from stand_ins import NUM_CANDIDATES, make_table
from tiny_models import save_tiny_encoder, save_tiny_llama

from rlrag.config import (
    DataConfig,
    EnvironmentConfig,
    GeneratorConfig,
    PromptConfig,
    RetrievalConfig,
    RunConfig,
    TrainingConfig,
)
from rlrag.pipeline import TrainingData

# A property holds however busy the machine is.
settings.register_profile("rlrag", deadline=None)
settings.load_profile("rlrag")
# A shell's background job ignores Ctrl-C, and so would the programs that tests start and stop.
signal.signal(signal.SIGINT, signal.default_int_handler)


@pytest.fixture
def training_data() -> TrainingData:
    return TrainingData(
        make_table(24), make_table(8, seed=1), {"corpus": "c", "train_questions": "q"}
    )


@pytest.fixture
def few_data() -> TrainingData:
    """So little that a tiny language model can be trained on it too."""
    return TrainingData(make_table(12), make_table(4, seed=1), {})


@pytest.fixture(scope="session")
def model_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A causal language model that is as small as one can be."""
    return save_tiny_llama(tmp_path_factory.mktemp("generator"))


@pytest.fixture(scope="module")
def cluster(request: pytest.FixtureRequest) -> Iterator[None]:
    """A Ray cluster of two CPUs that ends with the test module.

    Its workers cannot import a test module by name; what is sent to them carries its code.
    """
    import cloudpickle
    import ray

    cloudpickle.register_pickle_by_value(request.module)
    ray.init(
        "local", num_cpus=2, include_dashboard=False, log_to_driver=False, object_store_memory=10**8
    )
    yield
    ray.shutdown()


@pytest.fixture(scope="session")
def openrag_files(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A corpus, questions that name their gold passages, and the models."""
    from openrag_runs import write_files

    folder = tmp_path_factory.mktemp("files")
    write_files(folder)
    save_tiny_encoder(folder / "encoder")
    save_tiny_llama(folder / "generator")
    return folder


@pytest.fixture
def small_config(tmp_path: Path) -> RunConfig:
    return RunConfig(
        recipe="small",
        cache_dir=str(tmp_path / "cache"),
        data=DataConfig(num_validation_questions=8),
        retrieval=RetrievalConfig(num_candidates=NUM_CANDIDATES),
        environment=EnvironmentConfig(num_selected=1),
        generator=GeneratorConfig(prompt=PromptConfig()),
        training=TrainingConfig(
            launcher="local",
            batch_size=8,
            num_epochs=4,
            learning_rate=0.02,
            validate_every=3,
            checkpoint_every=2,
            loggers=(),
        ),
    )


@pytest.fixture
def data_dir() -> Path:
    """The folder with real questions and passages."""
    return Path(os.environ["RLRAG_DATA_DIR"])


def pytest_configure() -> None:
    """One thread for what a test computes itself: its models are so small that a second thread
    gains nothing, and beside a busy process waiting for it takes a hundred times as long."""
    import torch

    torch.set_num_threads(1)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Skip what needs the data folder or a GPU where there is none; CI must have the folder.

    The longest tests come first, so that two processes that share the tests end at about the same
    time.
    """
    import torch

    for item in items:
        if item.get_closest_marker("data") and "RLRAG_DATA_DIR" not in os.environ:
            item.add_marker(pytest.mark.skip(reason="RLRAG_DATA_DIR is not set"))
        if item.get_closest_marker("gpu") and not torch.cuda.is_available():
            item.add_marker(pytest.mark.skip(reason="no CUDA device"))
    items.sort(key=lambda item: not _is_long(item))


def _is_long(item: pytest.Item) -> bool:
    names = getattr(item, "fixturenames", ())
    return "cluster" in names or any(map(item.get_closest_marker, ("slow", "vllm")))


@pytest.fixture
def unused_port() -> int:
    """A port of the loopback interface that nobody listens on."""
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        return listener.getsockname()[1]
