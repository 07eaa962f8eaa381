"""Command lines: types that refuse what cannot work, defaults in --help, and the arguments of the stages."""

import argparse
import functools
import math
import re
from fractions import Fraction

from support.errors import leave, note
from support.files import short_name
from support.hub import TEACHERS
from support.outputs import check_folder
from support.parallel import GPUS_OF_A_NODE, is_main, local_world_size, world_size
from support.prompts import COLUMNS, PROMPTS, is_encodable

# of evaluate.py those that need nothing but a student's images; fid and vbench want thousands of them, too
EVAL_METRICS = ("oracle", "clip", "pick", "hpsv2", "mps", "lpips")
# paper silent: metric models: CLIP, its prefix and LPIPS's pixels are those of DMD2, LPIPS and HPSv2 their
# first versions
CLIP = ("ViT-g-14", "laion2b_s12b_b42k", "A photo depicts ")
LPIPS = ("alex", 512)
METRIC_OPTIONS = {  # that no other metric reads
    "clip": ("--clip-model", "--clip-weights", "--clip-prefix"),
    "hpsv2": ("--hps-version",),
    "lpips": ("--lpips-net", "--lpips-size"),
}
GPU_GB = 80  # of the cards that most have
MAY_BE_EMPTY = ("negative_prompt", "clip_prefix", "options", "prompt")  # sample.py says more of the last
PROMPTS_HELP = "a prompt a line; or a .csv, .tsv, .jsonl, .json or .parquet file"


class Parser(argparse.ArgumentParser):
    """Groups its arguments, shows their defaults in --help, and says what is wrong once, not once a rank."""

    def __init__(self, doc, families=None):
        """families: {pipeline: kind of teacher}, of those whose defaults are shown."""
        super().__init__(description=doc, formatter_class=argparse.RawDescriptionHelpFormatter)
        self.families = families or {}
        self.titles = {}

    def group(self, title):
        """A function that adds an argument to the group of this title."""
        if title not in self.titles:
            self.titles[title] = self.add_argument_group(title)
        return functools.partial(self._add, self.titles[title])

    @staticmethod
    def _add(group, name, help, shown=None, **options):
        """shown: the default in words, where its value says little."""
        default = options.get("default") if shown is None else shown
        if default is not None and default is not False:
            help += f" (default {default})".replace("%", "%%")
        group.add_argument(name, help=help, **options)

    def parse_args(self, argv=None):
        """UserError's sentence for an option that is given nothing, as by a shell's variable that is not
        set."""
        args = super().parse_args(argv)
        self.given = {name for name, value in vars(args).items() if value != self.get_default(name)}
        for action in self._actions:
            given = getattr(args, action.dest, None)
            values = given if isinstance(given, list) else [given]
            if "" in values and given is not action.default and action.dest not in MAY_BE_EMPTY:
                self.error(f"{action.option_strings[0]} is empty: give it a value, or leave it out")
        return args

    def note_idle(self, names, without):
        """Tells of those of these options that are given, and have no effect without `without`."""
        idle = [name for name in names if find_attribute(name) in self.given]
        if idle:
            note(f"{', '.join(idle)}: of no effect without {without}")

    def default_of(self, name):
        """What each family's default is, in words: the paper's; the others are not imported for it."""
        words = [f"{family.__name__} {getattr(family, name):g}" for family in self.families.values()]
        return ", ".join([*words, "others their own"])

    def error(self, message):
        leave(message, 2, wait=not is_main())


def find_attribute(option):
    """ "--fake-lr" -> "fake_lr", which the arguments have its value under."""
    return option.removeprefix("--").replace("-", "_")


# ----------------------------------------------------------------------------------------------------------
# Types: text -> value; argparse turns their errors into sentences
# ----------------------------------------------------------------------------------------------------------


def number(kind, wanted, allowed, most=10**9):
    """An argument's type: a number of this kind (int, float or ratio) that is as wanted, and a whole one no
    larger than `most`."""

    def parse(text):
        value = kind(text)
        if not allowed(value):
            raise argparse.ArgumentTypeError(f"must be {wanted}, not {text}")
        if kind is int and value > most:
            raise argparse.ArgumentTypeError(f"must be at most {most}, not {text}")
        return value

    # argparse says "invalid number value: 'x'"
    parse.__name__ = "whole number" if kind is int else "number"
    return parse


def resolution(text):
    """ "1024" or "480x720" -> (height, width)."""
    match = re.fullmatch(r"(\d+)(?:x(\d+))?", text)
    sides = (int(match[1]), int(match[2] or match[1])) if match else (0, 0)
    if min(sides) < 1:
        raise argparse.ArgumentTypeError(f"must be a number of pixels or HEIGHTxWIDTH, not {text}")
    return sides


def ratio(text):
    """ "0.125" or "1/8" -> 0.125."""
    try:
        return float(Fraction(text)) if "/" in text else float(text)
    except (ZeroDivisionError, OverflowError) as error:
        raise ValueError(text) from error


def variant_name(text):
    """The word between two dots of a file's name."""
    if not re.fullmatch(r"\w+", text):
        raise argparse.ArgumentTypeError(f"must be a word as fp16, not {text!r}")
    return text


def encodable(text):
    if not is_encodable(text):
        raise argparse.ArgumentTypeError(f"{text!r} is not UTF-8 text")
    return text


def new_folder(text):
    """A folder's path, to which results can be written."""
    check_folder(text)
    return text


positive = number(int, "at least 1", lambda value: value >= 1)
whole = number(int, "at least 0", lambda value: value >= 0)
sampler_steps = number(int, "from 1 to 1000", lambda value: 1 <= value <= 1000)
seed_number = number(int, "from 0 to 2^63 - 1", lambda value: 0 <= value < 2**63, most=2**63)
head_width = number(int, "a multiple of 32", lambda value: value > 0 and value % 32 == 0)
non_negative = number(float, "at least 0", lambda value: 0 <= value < math.inf)
above_zero = number(float, "above 0", lambda value: 0 < value < math.inf)
unix_time = number(float, "a number of seconds", math.isfinite)
share = number(float, "at least 0 and below 1", lambda value: 0 <= value < 1)
# in units of T
step_length = number(ratio, "between 0 and 1", lambda value: 0 < value < 1)
score_time = number(ratio, "from 0 to 1", lambda value: 0 <= value <= 1)
student_time = number(ratio, "from 0.001 to 1", lambda value: 0.001 <= value <= 1)  # T = 1000 timesteps


# ----------------------------------------------------------------------------------------------------------
# Arguments of several scripts
# ----------------------------------------------------------------------------------------------------------


def add_teacher_arguments(parser, required=True):
    """Which teacher, and what it draws; common.load_teacher_from reads them."""
    add = parser.group("teacher")
    names = ", ".join(TEACHERS)
    shown = None if required else "the student's own"
    add("--teacher", f"{names}, a pipeline folder, or a hub id", required=required, shown=shown)
    variant = "of the teacher's weight files, as fp16 in model.fp16.safetensors"
    add("--variant", variant, type=variant_name, shown="those without one")
    add("--teacher-lora", "a LoRA .safetensors file that is merged into the teacher", metavar="FILE")
    shown = "the teacher's: SDXL and SD3 1024, CogVideoX 480x720"
    add("--resolution", "pixels: a side, or HEIGHTxWIDTH", type=resolution, shown=shown)
    shown = "the teacher's: CogVideoX 49"
    add("--frames", "frames of a video, a multiple of 8 (Wan: 4) plus 1", type=positive, shown=shown)
    add("--batch", "samples at a time on each rank", type=positive, shown=parser.default_of("batch"))
    precision = "precision of the networks' passes; weights that train are fp32"
    add("--precision", precision, choices=("fp32", "bf16"), shown="bf16 on a GPU, else fp32")


def add_sampler_arguments(parser):
    """How the teacher itself samples, and where networks wait that draw nothing."""
    add = parser.group("teacher")
    offload = "keep on the CPU what is not at work: text encoders, denoiser and VAE take turns on the GPU"
    add("--offload", offload, action="store_true")
    shown = parser.default_of("sampler_steps")
    add("--steps", "steps of the teacher's sampler", type=sampler_steps, shown=shown)
    shown = parser.default_of("guidance")
    add("--guidance", "the teacher's classifier-free guidance scale", type=non_negative, shown=shown)
    add_negative_prompt(parser, "teacher")


def add_negative_prompt(parser, title):
    add = parser.group(title)
    negative = "what the teacher's guidance leads away from"
    add(
        "--negative-prompt", negative, type=encodable, metavar="TEXT", shown="the pipeline's own, mostly none"
    )


def add_prompts_arguments(parser, title, text=PROMPTS_HELP, **options):
    """A file of prompts; support.prompts reads it. options: of argparse, for --prompts."""
    add = parser.group(title)
    add("--prompts", text, **options)
    columns = "the column or key of --prompts that has them"
    add("--prompt-column", columns, metavar="NAME", shown=", ".join(COLUMNS))


def add_scorer_arguments(parser, title):
    """The models of the scorers of metrics/."""
    add = parser.group(title)
    layout = "DIR/OWNER/REPOSITORY/FILE, DIR/FILE"
    add("--weights-dir", f"folder with the scorers' weights, for machines without network: {layout}")
    model, weights, prefix = CLIP
    add("--clip-model", "open_clip model", default=model)
    add("--clip-weights", "open_clip tag or a local checkpoint", default=weights)
    add("--clip-prefix", "put before every prompt", default=prefix)
    add("--hps-version", "of HPSv2's weights", choices=("2.0", "2.1"), default="2.0")
    nets = "backbone; random needs no file and gives no LPIPS, but numbers to compare within a table"
    net, pixels = LPIPS
    add("--lpips-net", nets, choices=("alex", "vgg", "random"), default=net)
    size = number(int, "at least 64", lambda value: value >= 64)
    add("--lpips-size", "pixels, images are resized to it", type=size, default=pixels)


def note_idle_scorers(parser, metrics):
    """Tells of the options of scorers that are not among the metrics."""
    for metric, names in METRIC_OPTIONS.items():
        if metric not in metrics:
            parser.note_idle(names, f"the metric {metric}")


def add_training_prompts(parser):
    """The same of a stage, with prompts to begin with."""
    shown = "prompts/general.txt, 64 of our own to try things with"
    add_prompts_arguments(parser, "method", default=PROMPTS, shown=shown)


# ----------------------------------------------------------------------------------------------------------
# The training stages
# ----------------------------------------------------------------------------------------------------------

# paper silent: learning rates: DMD2's for SDXL: 5e-7 for the student, 1e-5 where it pre-trains on ODE pairs,
# 5e-5 for LoRA; the fake score five times as fast, where DMD2 updates it five times; heads ten times as fast
# as a student that trains whole. None was tried at full size.
ADM_RATES = {  # name: (of what, all weights, --lora)
    "--lr": ("the student", 5e-7, 5e-5),
    "--fake-lr": ("the fake score", 2.5e-6, 2.5e-4),
    "--head-lr": ("the discriminator's heads", 5e-6, 5e-6),
}
ADP_RATES = {
    "--lr": ("the student", 1e-5, 5e-5),
    "--warmup-lr": ("the student in the warm-up", 1e-5, 5e-5),
    "--head-lr": ("the discriminators' heads", 1e-4, 1e-4),
}


def parse_adm_arguments(doc, argv, families, method):
    """The arguments of adm.py. method: class ADM, which has the losses that --loss may name."""
    parser = Parser(doc, families)
    add_teacher_arguments(parser)
    add_training_prompts(parser)
    add = parser.group("method")
    add("--init", "checkpoint of adp.py or adm.py to start from", shown="the teacher")
    shown = f"those of --init, else the paper's: {parser.default_of('student_steps')}"
    add("--steps", "steps of the student", type=sampler_steps, shown=shown)
    first = "the student's first time, in units of T, where it predicts noise or v; DMD2's one step: 0.4"
    add("--first-time", first, type=student_time, shown="that of --init, else 1")
    loss = "what moves the student; dmd and line have no discriminator, and no use for --r1, --r2, --head-lr"
    add("--loss", loss, choices=list(method.losses), default="adm")
    # paper silent: guidance: DMD2's 8 for SDXL, the pipelines' own defaults for the others
    shown = parser.default_of("adm_guidance")
    add("--guidance", "the teacher's classifier-free guidance scale", type=non_negative, shown=shown)
    add_negative_prompt(parser, "method")
    # paper silent: dt: by public notes; the two classes of the discriminator differ by about dt
    add("--dt", "length of the ODE step, in units of T", type=step_length, default="1/64")
    t_range = "lowest and highest time of the student's loss, in units of T; DMD2: 0.02 0.98"
    add("--t-range", t_range, type=score_time, nargs=2, metavar=("LOW", "HIGH"), shown="dt and 1")
    ttur = "updates of fake score and discriminator for one of the student"
    add("--ttur", ttur, type=positive, default=1)  # paper
    r1 = "weight of D's gradient penalty on real samples, times dt and the size of a latent"
    add("--r1", r1, type=non_negative, default=0.004)
    add("--r2", "weight of the same on fake samples", type=non_negative, default=0.004)
    r_noise = "standard deviation of the noise that the penalties take their differences with"
    add("--r-noise", r_noise, type=above_zero, default=0.1)
    project = "the student learns only the part of D's gradient along x_real - x_fake; ours, not the paper's"
    add("--project", project, action="store_true")
    straight = "the gradient of x_fake is taken for x_t's, without a pass back through the fake score; ours"
    add("--straight-through", straight, action="store_true")
    warmup = "first iterations, in which only the fake score and the heads learn"
    add("--warmup", warmup, type=whole, default=0)
    add_training_arguments(parser)
    add_learning_rates(parser, ADM_RATES)
    args = parse_training_arguments(parser, argv, ADM_RATES, "adm")
    if args.project and args.loss != "adm":
        parser.error("--project is for --loss adm: no other has a gradient of D to project")
    if args.straight_through and args.loss == "dmd":
        parser.error("--straight-through is not for --loss dmd, which never goes back through the fake score")
    if args.loss not in method.with_discriminator:
        of_D = ["--r1", "--r2", "--r-noise", "--head-lr", "--head-width"]
        parser.note_idle(of_D, f"a discriminator, which --loss {args.loss} has not")
    elif not (args.r1 or args.r2):
        parser.note_idle(["--r-noise"], "an --r1 or --r2 above 0")
    if args.warmup >= args.iterations:
        note("--warmup covers all iterations, so that the student never learns")
    low, high = args.t_range or (args.dt, 1.0)
    if low < args.dt:
        note(f"the student's loss is at times from --dt, {args.dt:g} T, as x_fake and x_real are dt below")
        low = args.dt
    if low >= high:
        parser.error(f"--t-range: HIGH must be above LOW and above --dt, not {high:g}")
    args.t_range = low, high
    return args


def parse_adp_arguments(doc, argv, families):
    """The arguments of adp.py."""
    parser = Parser(doc, families)
    add_teacher_arguments(parser)
    add = parser.group("method")
    add("--pairs", "folder of collect_ode.py", shown="pairs/TEACHER")
    backbone = "a SAM checkpoint file; sam_vit_b, sam_vit_l, sam_vit_h; dinov2 or a folder of one"
    add("--pixel-backbone", backbone, default="sam_vit_b")
    latent = "weight of the latent discriminator"
    add("--lambda-latent", latent, type=non_negative, default=0.85)  # paper
    pixel = "weight of the pixel discriminator; 0 leaves it out"
    add("--lambda-pixel", pixel, type=non_negative, default=0.15)  # paper
    warmup = (
        "first iterations on the velocity's squared error alone; with all of them, and --lambda-pixel 0, "
        "this is rectified flow"
    )
    shown = "500, and 0 for a flow-matching teacher"
    add("--warmup", warmup, type=whole, shown=shown)
    power = "of 1 - t/T in u, which is uniform: 3 is the paper's; 1, uniform times, rectified flow's"
    add("--time-power", power, type=above_zero, default=3.0)  # paper
    mse = "weight of the velocity's squared error after the warm-up"
    add("--mse", mse, type=non_negative, default=0.0)
    add_training_arguments(parser)
    add_learning_rates(parser, ADP_RATES)
    args = parse_training_arguments(parser, argv, ADP_RATES, "adp")
    args.pairs = args.pairs or f"pairs/{short_name(args.teacher)}"
    only_warms_up = args.warmup is not None and args.warmup >= args.iterations
    if not (args.lambda_latent or args.lambda_pixel or args.mse or only_warms_up):
        parser.error("after the warm-up nothing moves the student: give a --lambda or --mse above 0")
    if not args.lambda_pixel:
        parser.note_idle(["--pixel-backbone"], "a --lambda-pixel above 0")
    if args.warmup == 0:
        parser.note_idle(["--warmup-lr"], "a --warmup above 0")
    return args


def add_learning_rates(parser, rates):
    add = parser.group("optimisation")
    for name, (what, full, lora) in rates.items():
        shown = f"{full:g}; with --lora {lora:g}"
        add(name, f"learning rate of {what}", type=non_negative, shown=shown)


def parse_training_arguments(parser, argv, rates, stage):
    """The arguments, with the stage's own defaults where the command line has none."""
    args = parser.parse_args(argv)
    if args.eval_every and not args.eval_prompts:
        parser.error("--eval-every scores the student on prompts of its own: give --eval-prompts FILE")
    if not args.eval_every:
        names = ("--eval-prompts", "--eval-prompt-column", "--eval-metric", "--eval-seeds", "--weights-dir")
        parser.note_idle(names, "--eval-every")
    note_idle_scorers(parser, [args.eval_metric] if args.eval_every else [])
    if args.lora and args.compile:
        parser.error("--compile is for networks that train whole; --lora has none")
    if args.lora_targets and not args.lora:
        parser.error("--lora-targets says what --lora adapts: give --lora RANK, too")
    if args.gpu_gb and not args.plan:
        parser.error("--gpu-gb is what --plan compares with: give that, too")
    args.gpu_gb = args.gpu_gb or GPU_GB
    choose_shard(parser, args)
    if not args.out:  # one that is given was tried by its type
        args.out = f"runs/{stage}-{short_name(args.teacher)}"
        if not args.plan:
            check_folder(args.out)
    for name, (_, full, lora) in rates.items():
        attribute = find_attribute(name)
        if getattr(args, attribute) is None:
            setattr(args, attribute, lora if args.lora else full)
    return args


def choose_shard(parser, args):
    """--shard where that many processes, on that many nodes, have nobody to share with: what comes to the
    same. Says so."""
    ranks = args.plan or world_size()
    of_node = min(GPUS_OF_A_NODE, ranks) if args.plan else local_world_size()
    if ranks == 1 and args.shard != "ddp":
        note(
            f"one process has nobody to share with: --shard {args.shard} makes no difference; "
            "torchrun --nproc_per_node=N starts several"
        )
        args.shard = "ddp"
    if args.shard != "hsdp":
        return
    if args.lora:
        parser.error("--shard hsdp is for networks that train whole: with --lora give --shard fsdp")
    if ranks % of_node:
        parser.error(f"--shard hsdp wants as many processes on every node, not {ranks} in nodes of {of_node}")
    if ranks == of_node:
        note("one node has no other to copy: --shard hsdp is fsdp")
        args.shard = "fsdp"
    elif of_node == 1:
        note("one process a node has nobody to share with: --shard hsdp is ddp")
        args.shard = "ddp"


def add_training_arguments(parser):
    """The arguments that adm.py and adp.py share."""
    add = parser.group("method")
    # paper: 256
    add("--head-width", "hidden channels of the heads, a multiple of 32", type=head_width, default=256)
    told = "guidance that student and fake score are told, for teachers that take theirs so (FLUX.1-dev)"
    add("--student-guidance", told, type=above_zero, shown="that of --init, or of the teacher")

    add = parser.group("optimisation")
    add("--iterations", "updates of the student", type=positive, default=10000)
    add("--betas", "of AdamW", type=share, nargs=2, default=(0.9, 0.999), shown="0.9 0.999")
    add("--weight-decay", "of AdamW", type=non_negative, default=0.01)
    add("--clip", "norm that gradients are clipped to", type=above_zero, default=10.0)
    decay = (
        "share of the iterations, at the end, over which the learning rates (in ADP the student's) fall to 0"
    )
    add("--decay", decay, type=share, default=0.0)
    ema = "decay of the student's moving average, which is what is saved; 0 is none"
    add("--ema", ema, type=share, default=0.0)
    accumulate = "micro-batches of --batch samples on each rank for one update"
    add("--accumulate", accumulate, type=positive, default=1)

    add = parser.group("memory")
    shard = (
        "what the ranks share: nothing (ddp); the optimisers' states (zero1: 9 bytes a parameter that trains "
        "on 8 GPUs, instead of 16); all states and weights, the teacher's too (fsdp: 2 bytes), or those of a "
        "node among its own ranks alone (hsdp, for many nodes)"
    )
    add("--shard", shard, choices=("ddp", "zero1", "hsdp", "fsdp"), default="ddp")
    lora = "rank of adapters on the frozen teacher, which are all that trains; 0 trains every weight"
    add("--lora", lora, type=whole, default=0)
    targets = "endings of the names of the layers that get an adapter, as to_q to_k to_v"
    add("--lora-targets", targets, nargs="+", metavar="ENDING", shown="all linear ones of the blocks")
    offload = "keep text encoders and VAE on the CPU but while used; 256 prompts of a rank are encoded ahead"
    add("--offload", offload, action="store_true")
    checkpointing = "keep activations instead of computing them twice"
    add("--no-checkpointing", checkpointing, dest="checkpointing", action="store_false")
    # not the teacher: hooks read its blocks
    add("--compile", "torch.compile the blocks of student and fake score", action="store_true")
    plan = (
        "say what each of so many GPUs (8 where no number is given) would hold, and stop; without weights, "
        "GPU or network"
    )
    add("--plan", plan, type=positive, nargs="?", const=8)
    gpu_gb = "memory of a GPU that --plan compares with, in 1e9 bytes"
    add("--gpu-gb", gpu_gb, type=above_zero, shown=GPU_GB)

    add = parser.group("run")
    add("--out", "the run's folder", type=new_folder, shown="runs/STAGE-TEACHER")
    add("--resume", "go on from the run's newest checkpoint, if there is one", action="store_true")
    add("--log-every", "iterations between two lines of metrics", type=positive, default=10)
    add("--save-every", "iterations between two checkpoints", type=positive, default=1000)
    minutes = "minutes after a checkpoint that another is due, after however few iterations"
    add("--save-minutes", minutes, type=above_zero, default=60)
    add("--keep", "newest checkpoints that are kept, beside the best", type=positive, default=3)
    patience = "iterations in a row with gradients that are not finite, after which the run ends"
    add("--patience", patience, type=positive, default=20)
    add("--seed", "seed of everything random", type=seed_number, default=0)

    title = "held-out score"
    add = parser.group(title)
    every = "iterations between two scores of the student on --eval-prompts, whose best checkpoint is kept"
    add("--eval-every", every, type=whole, default=0, shown="0, never")
    add("--eval-prompts", f"those that no student trains on: {PROMPTS_HELP}")
    column = "the column or key of --eval-prompts that has them"
    add("--eval-prompt-column", column, metavar="NAME", shown=", ".join(COLUMNS))
    metric = "which of evaluate.py's metrics; oracle is for the tiny teachers"
    add("--eval-metric", metric, choices=EVAL_METRICS, default="oracle")
    add("--eval-seeds", "samples of each of them", type=positive, default=4)
    add_scorer_arguments(parser, title)
