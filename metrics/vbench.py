"""VBench: its list of prompts, its layout of videos, its command, and its summary of the dimensions."""

import contextlib
import json
import os
import shlex
import shutil
import subprocess

from support.errors import UserError, first_line, note
from support.files import make_folder, read_sealed, remove, write_atomically, write_sealed
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


VIDEOS = 5  # of a prompt: what VBench reads of a dimension
FLICKERING = "temporal_flickering"


def read_prompts_of_table(path, column=None):
    """A prompt file -> (prompts, the dimensions of each prompt). The dimensions are those of VBench's own
    list, VBench_full_info.json; None for other files, and where `column` says what to read."""
    entries = None
    if path.lower().endswith(".json") and not column:
        with contextlib.suppress(OSError, ValueError, RecursionError):  # read_prompts says what is wrong
            entries = json.load(open_text(path))
    if not entries or not isinstance(entries, list) or not all(map(is_entry, entries)):
        return read_prompts(path, column), None
    return [entry["prompt_en"] for entry in entries], [entry["dimension"] for entry in entries]


def is_entry(value):
    """Whether it is a prompt with its dimensions."""
    if not isinstance(value, dict) or not isinstance(value.get("dimension"), list):
        return False
    prompt = value.get("prompt_en")
    is_text = isinstance(prompt, str) and prompt.strip() and "\0" not in prompt and is_encodable(prompt)
    return is_text and all(name in (*QUALITY, *SEMANTIC) for name in value["dimension"])


def check_vbench(prompts, dimensions, seeds):
    """UserError where VBench could not find a prompt's videos, which it knows by the name PROMPT-INDEX.mp4.
    Notes where it wants another number of them."""
    seen = set()
    for prompt, names in zip(prompts, dimensions):
        video = name_video(prompt, seeds - 1)
        if "/" in video or len(video.encode()) > 255:
            raise UserError(
                f"--metrics vbench: the prompt {prompt!r} cannot be a file's name, by which VBench finds its "
                "videos: it has a / or more than 255 bytes; leave it out"
            )
        for dimension in names:
            if (prompt, dimension) in seen:
                raise UserError(
                    f"--metrics vbench: the prompt {prompt!r} is twice in the dimension {dimension}, where "
                    "VBench would find the same videos for both; leave one out"
                )
            seen.add((prompt, dimension))
    if seeds != VIDEOS:
        note(f"VBench reads {VIDEOS} videos of every prompt; --seeds {seeds} gives it {seeds}")
    if any(FLICKERING in names for names in dimensions):
        note(
            f"for {FLICKERING} VBench wants --seeds 25 and its static_filter.py run on these videos, which "
            f"keeps {VIDEOS} that do not move; a score without it is not to be compared with published ones"
        )


def run_vbench(folder, videos, prompts, dimensions):
    """Videos [P][K] (paths of mp4 files) -> {dimension: score}, and the summary if all dimensions are there.

    Lays them out as VBench wants them, FOLDER/DIMENSION/PROMPT-INDEX.mp4, and runs it where it is installed;
    where it is not, the result is {} and the commands are printed."""
    scores = {}
    for dimension in sorted(set().union(*dimensions)):
        place = os.path.abspath(os.path.join(folder, dimension))
        output = os.path.abspath(os.path.join(folder, "results", dimension))
        make_folder(place)
        for paths, prompt, names in zip(videos, prompts, dimensions):
            if dimension in names:
                link_videos(paths, place, prompt)
        words = ["--videos_path", place, "--dimension", dimension, "--output_path", output]
        command = ["vbench", "evaluate", *words]
        if shutil.which("vbench"):
            scores[dimension] = run_dimension(command, dimension, output)
        else:
            print(shlex.join(command))
    return summarise(scores) | scores


def name_video(prompt, index):
    return f"{prompt}-{index}.mp4"


def link_videos(paths, place, prompt):
    for index, path in enumerate(paths):
        link = os.path.join(place, name_video(prompt, index))
        if os.path.exists(link):
            continue
        try:
            os.link(path, link)
        except OSError:  # not every disk has links
            with write_atomically(link) as temporary:
                shutil.copyfile(path, temporary)


def run_dimension(command, dimension, output):
    """The score of a dimension, the mean over the videos: what VBench finds, or found when the same command
    ran before, as the videos of a folder stay the same."""
    kept = os.path.join(output, "score.json")
    record = read_sealed(kept)
    if record and record["command"] == command:
        return record["score"]
    remove(output)
    make_folder(output)
    try:
        subprocess.run(command, check=True)
        results = [name for name in os.listdir(output) if name.endswith("eval_results.json")]
        if not results:  # its command ends with 0 whatever happened inside
            raise ValueError(f"it wrote nothing to {output}")
        with open(os.path.join(output, results[0])) as file:
            mean, *_ = json.load(file)[dimension]  # and a list of the videos' scores
    except (subprocess.CalledProcessError, ValueError, KeyError, TypeError) as error:
        reason = first_line(error)
        raise UserError(f"vbench gave no result: {shlex.join(command)}: {reason}") from error
    write_sealed(kept, {"command": command, "score": mean})
    return mean


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
