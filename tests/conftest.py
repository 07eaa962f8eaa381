"""Fixtures of all tests: random tiny teachers and what belongs to them, built once; no network is needed."""

import os
import sys

os.environ |= {"OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}
sys.path.insert(0, os.path.dirname(os.path.dirname(os.path.abspath(__file__))))  # the repository's root

import pytest
import torch

import helpers
from support import run
from tiny import shapes

torch.set_num_threads(1)


def pytest_configure(config):
    config.addinivalue_line("markers", "slow: seldom the first to fail; run by `make test-slow`")


@pytest.fixture(scope="session", autouse=True)
def cheap_curves():
    """Runs write words for their curves, whose drawing takes a third of a short run: test_smoke.py draws."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(run, "save_curves", helpers.write_curves)
        yield


@pytest.fixture(scope="session")
def teacher_folder(tmp_path_factory):
    return helpers.make_teacher(tmp_path_factory.mktemp("teacher"), seed=0)


@pytest.fixture(scope="session")
def teacher(teacher_folder):
    return helpers.load_teacher(teacher_folder, torch.device("cpu"))


@pytest.fixture(scope="session")
def sam_file(tmp_path_factory):
    return helpers.save_sam(helpers.make_sam(seed=0), tmp_path_factory.mktemp("sam") / "sam.pth")


@pytest.fixture(scope="session")
def prompts_file(tmp_path_factory):
    path = tmp_path_factory.mktemp("prompts") / "prompts.txt"
    training, _, _ = shapes.split_prompts()
    path.write_text("\n".join(training[:20]) + "\n")
    return str(path)


@pytest.fixture(scope="session")
def pairs_folder(tmp_path_factory, teacher_folder, prompts_file):
    folder = str(tmp_path_factory.mktemp("pairs") / "pairs")
    source = ["--teacher", teacher_folder, "--prompts", prompts_file]
    helpers.collect(*source, "--out", folder, "--count", "12", "--shard-size", "5", "--steps", "2")
    return folder


@pytest.fixture(scope="session")
def adp_arguments(teacher_folder, pairs_folder, sam_file):
    source = ["--teacher", teacher_folder, "--pairs", pairs_folder, "--pixel-backbone", sam_file]
    return source + helpers.QUICK


@pytest.fixture(scope="session")
def adm_arguments(teacher_folder, prompts_file):
    source = ["--teacher", teacher_folder, "--prompts", prompts_file, "--fake-lr", "1e-4"]
    return source + helpers.QUICK
