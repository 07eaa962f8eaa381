"""Stage 0: collects ODE pairs (x_T, x_0) from the guided teacher's deterministic sampler, the data of ADP.

    python collect_ode.py --teacher assets/tiny-sdxl --prompts prompts/shapes_train.txt --out pairs/tiny
    torchrun --nproc_per_node=8 collect_ode.py --teacher sdxl --prompts prompts.txt --count 100000

Writes OUT/00000.safetensors ... (x_T, x_0 as [n, C, (F,) H, W], half precision; prompt numbers) and
OUT/index.json, which says what they are. A pair depends on --seed and its number alone: any number of ranks
writes the same files, and a repeated command skips the shards that are there, and begins others anew."""

import support.interrupt  # noqa: F401  Ctrl-C while torch loads
import math
import os

import torch
from tqdm import tqdm

import common
from support import arguments
from support.arguments import new_folder, positive, seed_number
from support.errors import UserError, launch, note
from support.files import lock_folder, make_folder, read_sealed, short_name, write_sealed
from support.folders import check_index
from support.loading import describe_teacher, name_both
from support.offload import at_work
from support.pairs import find_problem, identify, shard_path, write_shard
from support.parallel import is_main, leave_together, own_device, rank, world_size
from support.prompts import read_training_prompts
from support.rng import RowRNG


def parse_arguments(argv):
    parser = arguments.Parser(__doc__, common.FAMILIES)
    arguments.add_teacher_arguments(parser)
    arguments.add_sampler_arguments(parser)
    arguments.add_training_prompts(parser)
    add = parser.group("method")
    count = "number of pairs, each of a random prompt; a folder that is there cannot grow"
    add("--count", count, type=positive, default=4096)
    add = parser.group("run")
    add("--out", "folder for the shards", type=new_folder, shown="pairs/TEACHER")
    add("--shard-size", "pairs in a file", type=positive, default=64)
    add("--seed", "seed of noise and prompts", type=seed_number, default=0)
    return parser.parse_args(argv)


def main(argv=None):
    args = parse_arguments(argv)
    prompts = read_training_prompts(args.prompts, args.prompt_column)
    device = own_device()  # the ranks share nothing but the list of shards: no group, no waiting
    teacher = common.load_teacher_from(args, device)
    args.steps = args.steps or teacher.sampler_steps
    args.guidance = teacher.guidance if args.guidance is None else args.guidance
    out = args.out or os.path.join("pairs", short_name(args.teacher))
    index = {
        "teacher": name_both(describe_teacher(args.teacher), args.teacher_lora),
        "fingerprint": teacher.fingerprint,
        "steps": args.steps,
        "guidance": args.guidance,
        "negative_prompt": teacher.null_prompt,
        "precision": str(teacher.dtype).removeprefix("torch."),
        "seed": args.seed,
        "resolution": teacher.resolution,
        "latent_shape": list(teacher.latent_shape),
        "count": args.count,
        "shard": args.shard_size,
        "prompts": list_used(args, prompts),
        "choices": len(prompts),  # with another number of them a pair would draw another
    }
    teacher.check(index["prompts"])
    with lock_folder(out):
        collect_missing(args, teacher, prompts, index, out)
    leave_together()


def draw(args, numbers, device):
    """The random numbers of the pairs with these numbers; the first that they give chooses the prompt."""
    return RowRNG(numbers, ("pairs", args.seed), device)


def list_used(args, prompts):
    """Those of the prompts that a pair has: a file may have millions more."""
    drawn = set()
    for number in range(args.count):
        drawn.update(draw(args, [number], "cpu").choose(prompts))
    return [prompt for prompt in dict.fromkeys(prompts) if prompt in drawn]


def collect_missing(args, teacher, prompts, index, out):
    """Writes the index and this rank's share of the shards, but for those that are there. UserError where
    the folder has another index."""
    path = os.path.join(out, "index.json")
    old = read_sealed(path) or index
    wanted = {**index, "teacher": old.get("teacher")}  # its fingerprint counts: the folder may have moved
    check_index(out, wanted, has_results=os.path.exists(shard_path(out, 0)))
    make_folder(out)
    if is_main():
        write_sealed(path, index)
    identity = identify(index)
    places = {prompt: place for place, prompt in enumerate(index["prompts"])}
    shards = range(math.ceil(args.count / args.shard_size))
    if len(shards) < world_size():
        idle = world_size() - len(shards)
        note(f"{len(shards)} shards leave {idle} of the processes without work: lower --shard-size")
    own = shards[rank() :: world_size()]
    missing = [k for k in own if find_problem(shard_path(out, k), identity)]
    total = sum(len(pairs_of_shard(args, k)) for k in missing)
    with tqdm(total=total, disable=not is_main(), unit="pair", desc="ODE pairs") as bar:
        for k in missing:
            tensors = collect(args, teacher, prompts, places, pairs_of_shard(args, k), bar)
            write_shard(shard_path(out, k), tensors, identity)


def pairs_of_shard(args, k):
    """The numbers of the pairs in shard k."""
    return range(k * args.shard_size, min((k + 1) * args.shard_size, args.count))


def collect(args, teacher, prompts, places, numbers, bar):
    """The tensors of the pairs with these numbers: x_T, x_0 [n, C, (F,) H, W], prompt [n]. places: of the
    prompts in the index, {prompt: its place}."""
    parts = []
    for first in range(0, len(numbers), args.batch):
        rng = draw(args, numbers[first : first + args.batch], teacher.device)
        chosen = rng.choose(prompts)
        cond = teacher.encode(chosen)
        x_T = rng.normal(*teacher.latent_shape)
        with at_work(teacher, teacher.denoiser):
            x_0 = teacher.sample(x_T, cond, args.steps, args.guidance)
        if not x_0.half().isfinite().all():
            raise UserError(
                f"the teacher's samples are not finite at --guidance {args.guidance:g}: lower it, "
                "or try --precision fp32"
            )
        prompt = torch.tensor([places[text] for text in chosen])
        parts.append((x_T.half().cpu(), x_0.half().cpu(), prompt))
        bar.update(len(prompt))
    x_T, x_0, prompt = map(torch.cat, zip(*parts))
    return {"x_T": x_T, "x_0": x_0, "prompt": prompt}


if __name__ == "__main__":
    launch(main)
