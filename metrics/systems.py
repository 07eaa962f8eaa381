"""The systems of a command line: a teacher and students that will draw, folders of images that are there."""

import os
import re
import sys

from common import load_student, load_teacher_of_students
from metrics.images import Images
from metrics.report import FILES, name_sheet
from support.checkpoints import find_checkpoint
from support.errors import UserError
from support.files import short_name
from support.images import list_images
from support.parallel import is_main
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
    if args.teacher or args.student:
        teacher = load_teacher_of_students(args, list(args.student.values()))
        teacher.check(prompts)
    if "teacher" in args.names:
        system = System(teacher, steps=args.steps, guidance=args.guidance)
        meta = {"guidance": system.guidance}
        systems["teacher"] = plan_images("teacher", out, system, prompts, seeds, meta)
    for name, folder in args.student.items():
        checkpoint = os.path.realpath(find_checkpoint(folder)[0])
        written = os.path.getmtime(os.path.join(checkpoint, "meta.json"))
        meta = {"student": checkpoint, "written": written}
        net, student, _ = load_student(folder, teacher)
        systems[name] = plan_images(name, out, System(teacher, student, net), prompts, seeds, meta)
    for name, folder in args.images.items():
        systems[name] = find_images(name, out, folder, prompts)
    return systems, teacher


def plan_images(name, out, system, prompts, seeds, meta):
    """The images that a system is to draw, in OUT/NAME/pictures/."""
    folder = os.path.join(out, name)
    files = []
    for p in range(len(prompts)):
        files.append([os.path.join(folder, "pictures", f"{p:04d}-{seed}.png") for seed in seeds])
    index = {
        "prompts": prompts,
        "seeds": list(seeds),
        "teacher": system.teacher.fingerprint,
        "resolution": system.teacher.resolution,
        "frames": system.teacher.frames,
        "steps": system.steps,
        **meta,
    }
    return Images(name, folder, files, index, system)


def find_images(name, out, source, prompts=None):
    """The images in the folder `source`, in the order of the numbers in their names: the same number for each
    of the prompts; without prompts each for itself. Results go to OUT/NAME.

    Says what else lies there. UserError where there are none, or the number of prompts does not divide
    theirs."""
    if not os.path.isdir(source):
        raise UserError(f"there is no folder of images {source!r}")
    try:
        files, others = list_images(source)
    except OSError as error:
        raise UserError(f"the folder {source} cannot be read: {error.strerror}") from error
    if others and is_main():
        few = ", ".join(others[:5]) + (", ..." if len(others) > 5 else "")
        print(
            f"note: {len(others)} files of {source} are no images and are passed over: {few}", file=sys.stderr
        )
    if not files:
        raise UserError(f"the folder {source} has no images")
    files.sort(key=lambda file: ([int(number) for number in re.findall(r"\d+", file)], file))
    count = len(prompts) if prompts else len(files)
    if len(files) % count:
        raise UserError(
            f"the folder {source} has {len(files)} images, which is no multiple of the {count} prompts"
        )
    paths = [os.path.join(source, file) for file in files]
    stamps = [[file, os.path.getsize(path), os.path.getmtime(path)] for file, path in zip(files, paths)]
    index = {"files": stamps}
    if prompts:
        index["prompts"] = prompts
    samples = len(paths) // count
    groups = [paths[i : i + samples] for i in range(0, len(paths), samples)]
    return Images(name, os.path.join(out, name), groups, index)


def find_reference(out, source):
    """The images of a folder that is no system of the table, for FID."""
    return find_images(f".reference-{short_name(source)}", out, source)
