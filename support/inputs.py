"""What a command will read, tried before a teacher's weights are fetched and read."""

import os

from support.checkpoints import check_that_nodes_share, find_checkpoint, find_newest, list_checkpoints
from support.errors import UserError, require
from support.loading import describe_teacher
from support.packages import check_packages
from support.pairs import read_index
from support.parallel import agree
from support.prompts import read_prompts


def check_inputs(args):
    """UserError where the run's folder, --init, --pairs, --eval-prompts or a missing package would end it
    later."""
    require("matplotlib", "matplotlib", "draws curves.png")
    require("torchvision", "torchvision", "writes the previews")
    if args.lora:
        require("peft", "peft", "adds LoRA adapters")
    check_that_no_run_is_there(args)
    start = find_start(args)
    if start and not list_checkpoints(args.out):  # a run that goes on is compared whole, later
        check_start(args, *start)
    if getattr(args, "pairs", None):
        read_index(args.pairs)
    if args.eval_every:
        check_packages(args.eval_metric)
        if not is_stream(args.eval_prompts):  # which cannot be read a second time
            read_held_out_prompts(args)


def check_start(args, folder, meta):
    """UserError where a student of these arguments cannot start from that of a checkpoint."""
    kind = [meta["arguments"].get(name) for name in ("lora", "lora_targets")]
    if args.lora and kind != [args.lora, args.lora_targets]:
        raise UserError(
            f"--lora {args.lora} starts from the teacher, or from a student of the same --lora and "
            f"--lora-targets; {folder} is none"
        )


def is_stream(path):
    """Whether it is a pipe, as the shell's <(...)."""
    return os.path.exists(path) and not os.path.isfile(path) and not os.path.isdir(path)


def find_start(args, part=None):
    """(step folder, meta) of the checkpoint that training starts from: the newest of a run that goes on, as
    --init may be gone by then, else that of --init. None is the teacher. `part`: as find_checkpoint has
    it."""
    if not getattr(args, "init", None):
        return None
    own = find_newest(args.out, part) if args.resume else None
    check_that_nodes_share(args.out, own is not None)
    folder, meta = own or find_checkpoint(args.init, part)
    if not agree(meta["step"]):
        raise UserError(f"{folder} is not the newest on all nodes: give --init a step_... folder")
    return folder, meta


def fill_from_students(args, students):
    """Fills in what the command line leaves out of the teacher, its resolution and length, from the students'
    checkpoints (folders), the first one's teacher. UserError where they differ in size, as they are drawn
    together, or where there is neither a student nor a teacher."""
    if not args.teacher and not students:
        raise UserError("give a --student folder, a --teacher, or both")
    metas = [find_checkpoint(student)[1] for student in students]
    first = metas[0] if metas else {}
    if not args.teacher:
        args.teacher = first["teacher"]
        args.teacher_lora = args.teacher_lora or first.get("teacher_lora")
    if describe_teacher(args.teacher) == first.get("teacher"):
        args.variant = args.variant or first.get("variant")
    for name in ("resolution", "frames"):
        sizes = [meta.get(name) for meta in metas]
        if getattr(args, name) is None:
            if any(size != sizes[0] for size in sizes):
                known = ", ".join(map(str, sizes))
                raise UserError(f"the students have another {name} each ({known}): choose with --{name}")
            setattr(args, name, first.get(name))


def check_that_no_run_is_there(args):
    """UserError where --out has a run, unless it is to go on."""
    if list_checkpoints(args.out) and not args.resume:
        raise UserError(
            f"{args.out} holds a run already: add --resume to go on with it, or give another --out"
        )


def read_held_out_prompts(args):
    """The prompts of --eval-prompts, as read_prompts gives them."""
    return read_prompts(args.eval_prompts, args.eval_prompt_column, "--eval-prompt-column")
