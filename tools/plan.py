"""What --plan prints: the memory of each GPU, part by part, without weights, GPU or network.

Weights, gradients and optimisers are counted. Activations, and the passes of an iteration, are those of the
stage's own iteration, run on torch's meta device: what changes there changes here.
"""

import itertools

from support.checkpoints import count_most
from support.escapes import make_printable
from support.lora import find_targets
from support.parallel import GPUS_OF_A_NODE, find_blocks, is_main, shares_weights
from tools.meta import count_parameters
from tools.trace import Networks, change, shorten

GB = 1e9
SPEED = 200e12  # operations a second, between the 146 and the 272 T of an H200 in docs/benchmarks.md
SHARDS = ("ddp", "zero1", "hsdp", "fsdp")  # from the most memory to the least


def print_plan(args, stage, iterate):
    """--plan: what each of args.plan GPUs will hold, part by part, whether it fits args.gpu_gb, and if not,
    what would. stage and iterate: ADM or ADP, and its iteration.

    A GB is 1e9 bytes; an "80 GB" card has 85 of them, which leaves 5 to CUDA and to fragmentation. Under
    torchrun one process says it."""
    if not is_main():
        return
    networks = Networks(args, stage, iterate)
    rows = count_states(args, networks, args.plan)
    rows |= count_activations(args, networks)
    print(f"{make_printable(args.teacher)}, --shard {args.shard}, GB on each of {args.plan} GPUs")
    print(format_table(rows))
    print(describe_passes(args, networks))
    print(describe_time(args, networks))
    disk = count_checkpoint(args, networks) / GB
    written = f"--keep {args.keep} has {count_most(args)} of them while one is written"
    print(f"a checkpoint takes {disk:.1f} GB of disk; {written}")
    print(describe_fit(args, networks, add_up(rows)))


# ----------------------------------------------------------------------------------------------------------
# Counting
# ----------------------------------------------------------------------------------------------------------


def count_states(args, networks, processes):
    """What stays on each of so many GPUs: {part: bytes of (weights, gradients, optimiser)}.

    Gradients go with their optimiser's step, so one process never has those of student and fake score
    together; of several, DDP's buckets stay, and FSDP's shards are counted as if they did."""
    teacher = networks.teacher
    size = teacher.dtype.itemsize
    whole = count_parameters(teacher.denoiser)
    buffers = sum(b.numel() for b in teacher.denoiser.buffers())
    teacher_ranks = count_sharers(args, processes) if shares_weights(args) else 1
    if args.lora:
        kind = f"rank-{args.lora} adapters"
        trained = count_adapter(args, teacher)
        average = weights = gradients = 4 * trained  # they stay whole
    else:
        kind = "fp32"
        trained = whole
        average = gradients = 4 * trained / teacher_ranks
        weights = average + 4 * buffers
    optimiser = 8 * trained / count_sharers(args, processes)

    rows = {f"student, {kind}": (weights, gradients, optimiser)}
    if networks.fake_score:
        rows[f"fake score, {kind}"] = (weights, gradients if processes > 1 else 0, optimiser)
    rows["teacher, frozen"] = (size * (whole / teacher_ranks + buffers), 0, 0)
    if args.ema:
        rows["EMA of the student"] = (average, 0, 0)
    if networks.heads:
        heads = count_parameters(networks.heads)
        heads_ranks = 1 if args.shard == "ddp" else processes
        rows["discriminator heads"] = (4 * heads, 4 * heads, 8 * heads / heads_ranks)
    if networks.backbone:
        rows["pixel backbone"] = (size * count_parameters(networks.backbone.encoder), 0, 0)
    if not args.offload:
        rows["text encoders"] = (size * networks.text_encoders, 0, 0)
        rows["VAE"] = (size * count_parameters(teacher.pipe.vae), 0, 0)
    if shares_weights(args):
        rows["gathered from the other GPUs"] = count_gathered(args, networks)
    return rows


def count_sharers(args, processes):
    """How many of the processes have an optimiser's states between them."""
    if args.shard == "ddp":
        return 1
    return GPUS_OF_A_NODE if args.shard == "hsdp" else processes


def count_adapter(args, teacher):
    """Parameters of one network's --lora adapter."""
    layers = find_targets(teacher.denoiser, args.lora_targets).values()
    return sum(args.lora * (layer.in_features + layer.out_features) for layer in layers)


def count_gathered(args, networks):
    """Bytes of (weights, gradients, optimiser) that --shard fsdp and hsdp put together at a time: two blocks
    and the gradients of one, and of each network what is in no block."""
    denoiser = networks.teacher.denoiser
    size = networks.teacher.dtype.itemsize
    own = {}  # parameters of each block without those of the blocks inside it
    for module in (*reversed(find_blocks(denoiser)), denoiser):
        inside = sum(own.get(inner, 0) for inner in module.modules())
        own[module] = count_parameters(module) - inside
    rest = own.pop(denoiser)
    largest = max(own.values())
    if args.lora:
        count = 1
    else:
        count = 3 if networks.fake_score else 2
    return size * (2 * largest + count * rest), size * largest, 0


def count_activations(args, networks):
    """A row of the table, as of count_states, with what comes and goes in an iteration, at its peak."""
    activations = measure_activations(args, networks)
    name = f"activations, batch {args.batch}"
    if args.offload:
        # never together: prompts are encoded before the student's pass
        size = networks.teacher.dtype.itemsize
        if networks.backbone:
            activations += size * count_parameters(networks.teacher.pipe.vae)
        activations = max(activations, size * networks.text_encoders)
        name += ", or what was offloaded"
    return {name: (activations, 0, 0)}


def measure_activations(args, networks):
    """Bytes at the peak of an iteration, or of decoding a checkpoint's samples."""
    trace = networks.trace(args)
    more = args.accumulate - shorten(args).accumulate
    return max(trace.peak + more * trace.kept, networks.preview_peak)


def count_checkpoint(args, networks):
    """Bytes that a checkpoint takes on the disk: all that trains and its optimisers' states, and the student
    once more, in float32; of a --lora run its adapter alone."""
    state = networks.teacher.denoiser.state_dict()
    trained = sum(weight.numel() for weight in state.values())
    if args.lora:
        trained = count_adapter(args, networks.teacher)
    count = 4 * trained
    if networks.fake_score:
        count += 3 * trained
    if args.ema:
        count += trained
    if networks.heads:
        count += 3 * count_parameters(networks.heads)
    return 4 * count


def add_up(rows):
    """The bytes of all rows together."""
    return sum(sum(row) for row in rows.values())


# ----------------------------------------------------------------------------------------------------------
# Saying it
# ----------------------------------------------------------------------------------------------------------


def format_table(rows):
    """{part: bytes of (weights, gradients, optimiser)} -> lines of GB, with their sums."""
    lines = [f"{'':42}{'weights':>10}{'gradients':>10}{'optimiser':>10}{'sum':>10}"]
    columns = zip(*rows.values())
    sums = [sum(column) for column in columns]
    for name, row in {**rows, "sum": sums}.items():
        values = [*row, sum(row)]
        cells = [f"{value / GB:10.2f}" if value else " " * 10 for value in values]
        lines.append(f"{name:42}" + "".join(cells))
    return "\n".join(lines)


def describe_passes(args, networks):
    """A sentence with the passes of an iteration."""
    passes = networks.trace(args).passes
    short = vars(shorten(args))
    text = "an iteration"
    for name in ("ttur", "accumulate"):
        if vars(args).get(name, 1) != short[name]:
            text += f" of --{name} {short[name]}"
    text += f" makes {passes.full} full and {passes.partial} partial forward passes"
    if networks.steps > 1:
        more = short["accumulate"] * (networks.steps - 1)
        text += f" (and up to {more} more of G for its input)"
    learning = []
    passed = []
    for (name, kind), count in passes.backward.items():
        if kind == "parameters":
            learning.append(f"{name} {count}")
        else:
            passed.append(f"to the inputs of {name} {count}")
    return f"{text}; backward passes: {', '.join(learning + passed)}"


def describe_time(args, networks):
    """A sentence with the time of all iterations: of ADP at most that, as its warm-up's are cheaper."""
    flops = networks.count_flops(args)
    seconds = flops / SPEED
    hours = seconds * args.iterations / 3600
    return (
        f"{flops / 1e12:,.0f} TFLOP an iteration: {seconds:.1f} s at {SPEED / 1e12:.0f} TFLOP/s, and for "
        f"--iterations {args.iterations} {hours:,.0f} hours, {args.plan * hours:,.0f} GPU hours"
    )


def describe_fit(args, networks, total):
    """A sentence: whether so many bytes fit, and what would."""
    limit = args.gpu_gb * GB
    if total <= limit:
        return f"fits {args.gpu_gb:g} GB, with {(limit - total) / GB:.1f} to spare"
    options = list_smaller_options(args)
    for chosen in (*itertools.combinations(options, 1), *itertools.combinations(options, 2)):
        names = [name for _, values in chosen for name in values]
        if len(set(names)) < len(names):  # two values of one option
            continue
        changed = args
        for _, values in chosen:
            changed = change(changed, **values)
        if changed.lora and changed.shard == "hsdp":  # which is refused
            continue
        needed = add_up(count_states(changed, networks, args.plan))
        if needed <= limit:  # else the activations, which take seconds, make no difference
            needed += add_up(count_activations(changed, networks))
        if needed <= limit:
            text = " ".join(text for text, _ in chosen)
            return f"does not fit {args.gpu_gb:g} GB; with {text} it does, in {needed / GB:.1f}"
    text = ", ".join(text for text, _ in options)
    return f"does not fit {args.gpu_gb:g} GB, nor with any two of {text}"


def list_smaller_options(args):
    """Options that take less memory than these arguments, gentlest first: [(text, {name: value})]."""
    options = []
    for batch in range(args.batch - 1, 0, -1):
        if args.batch % batch == 0:  # the same global batch
            accumulate = args.accumulate * args.batch // batch
            values = {"batch": batch, "accumulate": accumulate}
            options.append((f"--batch {batch} --accumulate {accumulate}", values))
    if not args.offload:
        options.append(("--offload", {"offload": True}))
    if args.plan > 1:  # one process has nobody to share with
        for shard in SHARDS[SHARDS.index(args.shard) + 1 :]:
            if shard == "hsdp" and (args.plan == GPUS_OF_A_NODE or args.plan % GPUS_OF_A_NODE):
                continue  # no more nodes than one, or not whole ones
            options.append((f"--shard {shard}", {"shard": shard}))
    if not args.lora:
        options.append(("--lora 64", {"lora": 64}))
    return options
