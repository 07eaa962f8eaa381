"""Fixtures of all tests: random tiny teachers and what belongs to them, built once. One thread, no network."""
import os
import sys

os.environ |= {"OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}
sys.path.insert(0, os.path.dirname(os.path.dirname(os.path.abspath(__file__))))  # the repository's root

import pytest
import torch

import common
import helpers
from tiny import shapes

torch.set_num_threads(1)


@pytest.fixture(scope="session")
def teacher_folder(tmp_path_factory):
    return helpers.random_teacher(tmp_path_factory.mktemp("teacher"), seed=0)


@pytest.fixture(scope="session")
def teacher(teacher_folder):
    return common.load_teacher(teacher_folder, torch.device("cpu"))


@pytest.fixture(scope="session")
def sam_file(tmp_path_factory):
    path = tmp_path_factory.mktemp("sam") / "sam.pth"
    torch.save({f"image_encoder.{name}": weight for name, weight in helpers.random_sam(seed=0).state_dict().items()}, path)
    return str(path)


@pytest.fixture(scope="session")
def prompts_file(tmp_path_factory):
    path = tmp_path_factory.mktemp("prompts") / "prompts.txt"
    path.write_text("\n".join(shapes.split_prompts()[0][:20]) + "\n")
    return str(path)


@pytest.fixture(scope="session")
def pairs_folder(tmp_path_factory, teacher_folder, prompts_file):
    folder = str(tmp_path_factory.mktemp("pairs") / "pairs")
    helpers.collect("--teacher", teacher_folder, "--prompts", prompts_file, "--out", folder, "--count", "12", "--shard", "5", "--steps", "2")
    return folder


@pytest.fixture(scope="session")
def adp_arguments(teacher_folder, pairs_folder, sam_file):
    return ["--teacher", teacher_folder, "--pairs", pairs_folder, "--pixel-backbone", sam_file, *helpers.QUICK]


@pytest.fixture(scope="session")
def adm_arguments(teacher_folder, prompts_file):
    return ["--teacher", teacher_folder, "--prompts", prompts_file, "--fake-lr", "1e-4", *helpers.QUICK]
