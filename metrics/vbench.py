"""VBench: its list of prompts, its layout of videos, its command, and its summary of the dimensions."""

import contextlib
import json
import os
import shutil
import subprocess

from support.errors import UserError, first_line
from support.prompts import is_encodable, open_text, read_prompts

# Of each dimension the scores that become 0 and 1 in the summary, and its weight, as in VBench's
# scripts/constant.py
QUALITY = {
    "subject_consistency": (0.1462, 1.0, 1),
    "background_consistency": (0.2615, 1.0, 1),
    "temporal_flickering": (0.6293, 1.0, 1),
    "motion_smoothness": (0.706, 0.9975, 1),
    "aesthetic_quality": (0.0, 1.0, 1),
    "imaging_quality": (0.0, 1.0, 1),
    "dynamic_degree": (0.0, 1.0, 0.5),
}
SEMANTIC = {
    "object_class": (0.0, 1.0, 1),
    "multiple_objects": (0.0, 1.0, 1),
    "human_action": (0.0, 1.0, 1),
    "color": (0.0, 1.0, 1),
    "spatial_relationship": (0.0, 1.0, 1),
    "scene": (0.0, 0.8222, 1),
    "appearance_style": (0.0009, 0.2855, 1),
    "temporal_style": (0.0, 0.364, 1),
    "overall_consistency": (0.0, 0.364, 1),
}
SUMMARY = ("total", "quality", "semantic")  # in per cent


def read_prompts_of_table(path, column=None):
    """A prompt file -> (prompts, the dimensions of each prompt). The dimensions are those of VBench's own
    list, VBench_full_info.json; None for other files, and where `column` says what to read."""
    entries = None
    if path.lower().endswith(".json") and not column:
        with contextlib.suppress(OSError, ValueError, RecursionError):  # read_prompts says what is wrong
            entries = json.load(open_text(path))
    if not entries or not isinstance(entries, list) or not all(map(is_entry, entries)):
        return read_prompts(path, column), None
    prompts = [entry["prompt_en"] for entry in entries]
    for prompt in prompts:
        is_name = prompt and is_encodable(prompt) and not set(prompt) & set("/\0\n")
        if not is_name or len(prompt.encode()) > 240:
            raise UserError(f"the prompt {prompt!r} of {path} cannot be a video's name, as VBench wants it")
    return prompts, [entry["dimension"] for entry in entries]


def is_entry(value):
    """Whether it is an entry of VBench's list."""
    if not isinstance(value, dict) or not {"prompt_en", "dimension"} <= value.keys():
        return False
    return isinstance(value["prompt_en"], str) and isinstance(value["dimension"], list)


def run_vbench(folder, videos, prompts, dimensions):
    """Videos [P][K] (paths of mp4 files) -> {dimension: score}, and the summary if all dimensions are there.

    Lays them out as VBench wants them, FOLDER/DIMENSION/PROMPT-INDEX.mp4, and runs it where it is installed;
    where it is not, the result is {} and the commands are printed."""
    scores = {}
    for dimension in sorted({name for names in dimensions for name in names}):
        place = os.path.join(folder, dimension)
        output = os.path.join(folder, "results", dimension)
        os.makedirs(place, exist_ok=True)
        for paths, prompt, names in zip(videos, prompts, dimensions):
            if dimension in names:
                link_videos(paths, place, prompt)
        words = ["--videos_path", place, "--dimension", dimension, "--output_path", output]
        command = ["vbench", "evaluate", *words]
        if shutil.which("vbench"):
            scores[dimension] = run_dimension(command, dimension, output)
        else:
            print(" ".join(command))
    return summarise(scores) | scores


def link_videos(paths, place, prompt):
    for index, path in enumerate(paths):
        link = os.path.join(place, f"{prompt}-{index}.mp4")
        if not os.path.exists(link):
            os.link(path, link)


def run_dimension(command, dimension, output):
    """Runs VBench -> the score of a dimension, the mean over the videos."""
    os.makedirs(output, exist_ok=True)
    try:
        subprocess.run(command, check=True)
        results = [name for name in os.listdir(output) if name.endswith("eval_results.json")]
        newest = max((os.path.join(output, name) for name in results), key=os.path.getmtime)
        with open(newest) as file:
            mean, *_ = json.load(file)[dimension]  # and a list of the videos' scores
        return mean
    except (subprocess.CalledProcessError, ValueError, KeyError) as error:
        raise UserError(f"vbench gave no result: {' '.join(command)}: {first_line(error)}") from error


def summarise(scores):
    """{dimension: score} -> {"total", "quality", "semantic"} in per cent, as VBench's leaderboard has them;
    {} where a dimension is missing."""
    if not scores.keys() >= QUALITY.keys() | SEMANTIC.keys():
        return {}
    quality = average(scores, QUALITY)
    semantic = average(scores, SEMANTIC)
    return {"total": (4 * quality + semantic) / 5, "quality": quality, "semantic": semantic}


def average(scores, dimensions):
    """The weighted mean of these dimensions' normalised scores, in per cent."""
    total = 0
    for name, (low, high, weight) in dimensions.items():
        total += weight * (scores[name] - low) / (high - low)
    return 100 * total / sum(weight for _, _, weight in dimensions.values())
