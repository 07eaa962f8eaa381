"""The systems of a command line: a teacher and students that will draw, folders of images that are there."""

import os
import re

from common import load_student, load_teacher_from, open_student
from metrics.images import Images
from metrics.report import FILES, name_sheet
from support.checkpoints import find_checkpoint
from support.errors import UserError, note
from support.escapes import make_printable
from support.files import read_json, read_sealed, short_name
from support.folders import describe_difference
from support.images import list_images
from support.inputs import fill_from_students
from support.parallel import own_device
from support.systems import System


def name_systems(students, folders):
    """Lists of NAME=FOLDER, or of folders that give their own names -> {name: folder} of each of the two.

    UserError for a name that cannot be a folder's, or comes twice."""
    named = {}
    for entry in (*students, *folders):
        name, folder = entry.split("=", 1) if "=" in entry else (short_name(entry), entry)
        is_file = name in FILES or name.startswith(name_sheet("").removesuffix(".png"))
        if is_file or not re.fullmatch(r"[\w-][\w.-]{0,59}", name):
            allowed = "at most 60 letters, digits, dots, - and _, and not the name of a file of the report"
            raise UserError(f"{name!r} cannot be a system's name: write NAME=FOLDER with {allowed}")
        if name == "teacher" or name in named:
            raise UserError(f"there are two systems called {name!r}: write NAME=FOLDER to tell them apart")
        named[name] = folder
    pairs = list(named.items())
    return dict(pairs[: len(students)]), dict(pairs[len(students) :])


def open_systems(args, prompts, out):
    """-> ({name: its Images}, the teacher or None)."""
    seeds = range(args.seed, args.seed + args.seeds)
    systems, teacher = {}, None
    given = {name: find_images(name, out, folder, prompts) for name, folder in args.images.items()}
    # found once, as a run that goes on may have other ones soon
    checkpoints = {name: find_checkpoint(folder)[0] for name, folder in args.student.items()}
    if args.teacher or args.student:
        fill_from_students(args, list(checkpoints.values()))
        teacher = load_teacher_from(args, own_device())
        teacher.check(prompts)
    if "teacher" in args.names:
        system = System(teacher, steps=args.steps, guidance=args.guidance)
        systems["teacher"] = plan_images("teacher", out, system, prompts, seeds)
    if teacher:
        teacher.denoiser.to("cpu")  # every network waits there until it draws
    for name, checkpoint in checkpoints.items():
        folder, student, _ = open_student(checkpoint, teacher)
        net = load_student(folder, teacher).to("cpu")
        system = System(teacher, student, net, checkpoint=folder)
        systems[name] = plan_images(name, out, system, prompts, seeds)
    return systems | given, teacher


def plan_images(name, out, system, prompts, seeds):
    """The images that a system is to draw, in OUT/NAME/pictures/."""
    folder = os.path.join(out, name)
    files = []
    for p in range(len(prompts)):
        files.append([os.path.join(folder, "pictures", f"{p:04d}-{seed}.png") for seed in seeds])
    index = {"prompts": prompts, "seeds": list(seeds), **system.describe()}
    return Images(name, folder, files, index, system)


def find_images(name, out, source, prompts=None):
    """The images in the folder `source`, in the order of the numbers in their names: the same number for each
    of the prompts; without prompts each for itself. Results go to OUT/NAME.

    Says what else lies there. UserError where there are none, the number of prompts does not divide theirs,
    or an index beside them says that they are of other prompts."""
    if not os.path.isdir(source):
        raise UserError(f"there is no folder of images {source!r}")
    try:
        files, others = list_images(source)
    except OSError as error:
        raise UserError(f"the folder {source} cannot be read: {error.strerror}") from error
    others = [name for name in others if name not in ("grid.png", "index.json", ".lock")]  # sample.py's
    if others:
        few = ", ".join(others[:5]) + (", ..." if len(others) > 5 else "")
        note(f"{len(others)} files of {source} are no images and are passed over: {few}")
    if not files:
        raise UserError(f"the folder {source} has no images")
    files.sort(key=lambda file: ([int(number) for number in re.findall(r"\d+", file)], file))
    source_index = read_source_index(source) if prompts else None
    if source_index:
        check_source(source, source_index, files, prompts)
    count = len(prompts) if prompts else len(files)
    if len(files) % count:
        raise UserError(
            f"the folder {source} has {len(files)} images, which is no multiple of the {count} prompts"
        )
    if prompts and not source_index:
        fits = "no index.json says of which prompts they are; their number fits"
        note(f"the images in {make_printable(source)}: {fits}")
    paths = [os.path.join(source, file) for file in files]
    stamps = [[file, os.path.getsize(path), os.path.getmtime(path)] for file, path in zip(files, paths)]
    index = {"files": stamps}
    if prompts:
        index["prompts"] = prompts
    samples = len(paths) // count
    groups = [paths[i : i + samples] for i in range(0, len(paths), samples)]
    return Images(name, os.path.join(out, name), groups, index)


def read_source_index(source):
    """The index of images of sample.py, or of OUT/NAME/pictures of evaluate.py, whose index is in the folder
    above; None where nothing says what they are of. UserError for a damaged one."""
    place, name = os.path.split(os.path.abspath(source))
    for folder in [source, place] if name == "pictures" else [source]:
        path = os.path.join(folder, "index.json")
        index = read_sealed(path)
        if is_index(index):
            return index
        if os.path.lexists(path) and not isinstance(read_json(path), dict | list):
            raise UserError(f"{path}, which says what the images are of, is damaged: draw them again")
    return None


def is_index(value):
    """Whether it says which prompts and seeds images are of."""
    if not isinstance(value, dict):
        return False
    return isinstance(value.get("prompts"), list) and isinstance(value.get("seeds"), list)


def check_source(source, index, files, prompts):
    """UserError where an index says that these files are not images of the prompts, all of them and no
    others."""
    difference = describe_difference({"prompts": index["prompts"]}, {"prompts": prompts})
    if difference:
        raise UserError(f"the images in {source} are of other prompts than --prompts has: {difference}")
    if len(index.get("systems", ())) > 1:
        raise UserError(f"the images in {source} show two systems side by side: draw each by itself")
    if index.get("frames"):
        raise UserError(f"the images in {source} are a video's frames below one another, not single pictures")
    wanted = {f"{p:04d}-{seed}" for p in range(len(prompts)) for seed in index["seeds"]}
    found = {os.path.splitext(file)[0] for file in files}
    missing = sorted(wanted - found)
    if missing:
        raise UserError(f"the images in {source} are not all there: {missing[0]} is missing")
    more = sorted(found - wanted)
    if more:
        raise UserError(f"{more[0]} in {source} is none of the images that its index.json names: remove it")


def find_reference(out, source):
    """The images of a folder that is no system of the table, for FID."""
    return find_images(f".reference-{short_name(source)}", out, source)
