"""Ranks: how processes start, what each of them holds, and how their shares become whole tensors again."""

import contextlib
import datetime
import functools
import os
import warnings

import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.fsdp import FSDPModule, MixedPrecisionPolicy, fully_shard
from torch.distributed.tensor import DTensor, distribute_tensor
from torch.utils._pytree import tree_map

# The other ranks wait that long for the main one, which fetches a teacher, and writes checkpoints of up to
# 573 GB and reads them back for their checksums; within an iteration, where none is long behind the others,
# less: a card or a network that hangs would take all others' time.
PATIENCE = datetime.timedelta(hours=4)
WITHIN_AN_ITERATION = datetime.timedelta(minutes=30)
GPUS_OF_A_NODE = 8  # as --plan takes it


def rank():
    return read_number("RANK", 0)


def world_size():
    return read_number("WORLD_SIZE", 1)


def local_world_size():
    """The ranks of this node; all of them where torchrun did not say how many."""
    return read_number("LOCAL_WORLD_SIZE", world_size())


def read_number(name, default):
    """A whole number of the environment; support.errors.check_ranks refuses what is none."""
    value = os.environ.get(name, "")
    return int(value) if value.isdecimal() else default


def is_main():
    return rank() == 0


def own_device():
    """This rank's GPU, or the CPU."""
    if not torch.cuda.is_available():
        return torch.device("cpu")
    place = read_number("LOCAL_RANK", rank() % torch.cuda.device_count())  # srun sets none
    device = torch.device("cuda", place)
    torch.cuda.set_device(device)
    return device


def join_processes(seed):
    """Joins the processes that torchrun started, if it did -> this rank's device. The seed is for initial
    weights."""
    torch.manual_seed(seed)
    device = own_device()
    if "WORLD_SIZE" in os.environ and not dist.is_initialized():
        if device.type == "cuda":
            dist.init_process_group("nccl", timeout=PATIENCE, device_id=device)
        else:
            dist.init_process_group("gloo", timeout=PATIENCE)
    return device


def choose_dtype(precision, device):
    """ "fp32", "bf16" or None (bf16 on a GPU, else fp32) -> the dtype that networks run in."""
    if precision is None:
        precision = "bf16" if device.type == "cuda" else "fp32"
    return {"fp32": torch.float32, "bf16": torch.bfloat16}[precision]


def wait_for_all():
    if dist.is_initialized():
        dist.barrier()


def set_patience(timeout, args):
    """How long this rank waits for the others from here on, after which it ends with an error. args:
    --shard, as hsdp has groups of its own."""
    if not dist.is_initialized():
        return
    own = lay_out_nodes().get_all_groups() if args.shard == "hsdp" else ()
    for group in (dist.group.WORLD, *own):
        dist.set_timeout(timeout, group)


def leave_together():
    """Waits for the processes of the other nodes, where they share files and no group. torchrun's agents wait
    for each other for five minutes alone, and then end those that still work."""
    is_alone = world_size() == local_world_size()
    if is_alone or os.environ.get("TORCHELASTIC_USE_AGENT_STORE") != "True":
        return
    place = os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"])
    attempt = os.environ.get("TORCHELASTIC_RESTART_COUNT", "0")  # the store outlives a restart
    done, all_done = f"dmdx/{attempt}/done", f"dmdx/{attempt}/all done"
    with contextlib.suppress(RuntimeError):  # the node that has the store may be gone
        store = dist.TCPStore(*place, is_master=False)
        if store.add(done, 1) == world_size():
            store.set(all_done, "")
        store.wait([all_done], datetime.timedelta(days=30))


def average(values):
    """{name: scalar tensor or float} -> {name: float}, averaged over the ranks."""
    scalars = [torch.as_tensor(value, dtype=torch.float32).detach().cpu() for value in values.values()]
    packed = torch.stack(scalars)
    if dist.is_initialized():
        packed = add_up(packed) / world_size()
    return dict(zip(values, packed.tolist()))


def agree(number):
    """Whether all ranks have the same number. All call this, and hear the same."""
    if not dist.is_initialized():
        return True
    numbers = torch.zeros(world_size(), dtype=torch.float64)
    numbers[rank()] = number
    return len(add_up(numbers).unique()) == 1


def add_up(x):
    """A tensor of each rank, on the CPU -> their sum, on all of them and on the CPU."""
    if not dist.is_initialized():
        return x
    total = x.cuda() if dist.get_backend() == "nccl" else x.clone()
    dist.all_reduce(total)
    return total.cpu()


# ----------------------------------------------------------------------------------------------------------
# Networks on several ranks
# ----------------------------------------------------------------------------------------------------------


def wrap_ddp(module):
    """`module` in DDP if there are several ranks and it is not sharded. The bare module stays usable beside
    it."""
    if not dist.is_initialized() or isinstance(module, FSDPModule):
        return module
    on_gpu = next(module.parameters()).is_cuda
    for p in module.parameters():
        if p.requires_grad:  # DDP takes them into its buckets; --accumulate would make a second set else
            p.grad = torch.zeros_like(p)
    return nn.parallel.DistributedDataParallel(
        module,
        device_ids=[torch.cuda.current_device()] if on_gpu else None,
        gradient_as_bucket_view=True,
        forward_sync_buffers=False,  # they are constants
    )


def is_in_ddp(net):
    """Whether wrap_ddp gave it."""
    return isinstance(net, nn.parallel.DistributedDataParallel)


def shares_weights(args):
    """Whether a rank keeps no more than a share of the weights."""
    return args.shard in ("fsdp", "hsdp")


def shard(net, args, dtype):
    """With --shard fsdp each rank keeps its share of the weights of `net`, gradients and optimiser states
    alike (FSDP2), and a block is put together, in `dtype`, while it is used; with hsdp the ranks of a node
    share, and each node has all. In place."""
    if shares_weights(args) and dist.is_initialized():
        kept = set(list_float32_parts(net).values())
        policy = MixedPrecisionPolicy(
            param_dtype=dtype,
            reduce_dtype=torch.float32,
            cast_forward_inputs=False,  # a timestep of 999 is 1000 in bf16
            param_dtype_override_fn=lambda p: p.dtype if p in kept else None,
        )
        # of a block that returns a slice, as FLUX's do; nobody changes it in place
        warnings.filterwarnings("ignore", r"FSDP2-wrapped module .* returned a view tensor")
        mesh = lay_out_nodes() if args.shard == "hsdp" else None
        for module in (*reversed(find_blocks(net)), net):
            fully_shard(module, mesh=mesh, mp_policy=policy, reshard_after_forward=True)
    return net


@functools.cache
def lay_out_nodes():
    """The ranks, a row a node, as fully_shard takes those that share in rows. (init_device_mesh does not fit:
    its groups wait ten minutes, and a checkpoint takes longer.)"""
    rows = torch.arange(world_size()).view(-1, local_world_size())
    sharing = [dist.new_group(row.tolist(), PATIENCE) for row in rows]
    copies = [dist.new_group(column.tolist(), PATIENCE) for column in rows.T]
    node, place = divmod(rank(), local_world_size())
    groups = [copies[place], sharing[node]]
    names = ("copies", "sharing")
    return DeviceMesh.from_group(groups, own_device().type, mesh=rows, mesh_dim_names=names)


def find_blocks(net):
    """The modules of a diffusers network that should stay in one piece, outer ones before inner ones."""

    def stays_whole(module):
        return any(kind.__name__ in net._no_split_modules for kind in type(module).__mro__)

    return [module for module in net.modules() if stays_whole(module)]


def list_float32_parts(net):
    """{name: weight} of those that diffusers leaves in float32 where it reads the others in bf16, as Wan's
    tables."""
    kept = set(net._keep_in_fp32_modules or ())
    weights = net.state_dict(keep_vars=True)
    return {name: weight for name, weight in weights.items() if kept.intersection(name.split("."))}


def find_linear_layers(net):
    """{name: linear layer} of all that are in blocks."""
    inside = {part for block in find_blocks(net) for part in block.modules()}
    linear = {name: module for name, module in net.named_modules() if isinstance(module, nn.Linear)}
    return {name: module for name, module in linear.items() if module in inside}


def compile_blocks(net):
    """torch.compile, block by block, in place; of blocks within blocks, as SDXL's, the inner ones alone."""
    # blocks of a class share their code, and SDXL's are of many shapes
    torch._dynamo.config.recompile_limit = 64
    blocks = find_blocks(net)
    for block in blocks:
        _, *parts = block.modules()
        if not set(parts).intersection(blocks):
            block.compile()


@contextlib.contextmanager
def freeze(*modules):
    """Inside, the modules' parameters get no gradient (and DDP's hooks stay quiet). None is passed over."""
    present = [module for module in modules if module is not None]
    parameters = [p for module in present for p in module.parameters() if p.requires_grad]
    for p in parameters:
        p.requires_grad_(False)
    try:
        yield
    finally:
        for p in parameters:
            p.requires_grad_(True)


def freeze_named(net, parts):
    """Parameters with one of these parts in their names get no gradient ever, so that DDP waits for none."""
    for name, p in net.named_parameters():
        if any(part in name for part in parts):
            p.requires_grad_(False)


@contextlib.contextmanager
def sync_gradients(net, now):
    """Inside, a backward pass of `net` exchanges gradients over the ranks if `now`, else it only adds them
    up."""
    if isinstance(net, FSDPModule):
        net.set_requires_all_reduce(now)  # --shard hsdp: between nodes; each rank adds up its share meanwhile
    waits = is_in_ddp(net) and not now
    quiet = net.no_sync() if waits else contextlib.nullcontext()
    with quiet:
        yield


# ----------------------------------------------------------------------------------------------------------
# Shares and whole tensors
# ----------------------------------------------------------------------------------------------------------


def gather(state):
    """Values in any nesting. A tensor of which each rank has a share becomes whole, on the main rank's CPU,
    and None on the others; all else stays as it is. All ranks call it.

    torch.distributed.checkpoint.state_dict does not fit: it names optimiser states by the network's
    parameters, which ZeroRedundancyOptimizer and the adapters of --lora do not have, and a checkpoint is to
    be one file a part, the same for every --shard."""

    def make_whole(x):
        if isinstance(x, DTensor):
            x = x.full_tensor()
            return x.cpu() if is_main() else None
        return x

    return tree_map(make_whole, state)


def get_share(x):
    """What this rank keeps of a tensor that is laid out over the ranks; all of any other."""
    return x.to_local() if isinstance(x, DTensor) else x


def list_parameters(optimizer):
    """All that an optimiser trains, on whatever rank it keeps its state."""
    return [p for group in optimizer.param_groups for p in group["params"]]


def gather_zero1(optimizer):
    """A ZeroRedundancyOptimizer of AdamW -> its whole state_dict, on the main rank and its CPU; all ranks
    call it. A state is the sum of what the ranks have of it, zero but for one. Its own
    `consolidate_state_dict` pickles every share byte by byte: hours for SDXL."""
    parameters = list_parameters(optimizer)
    states = {}
    for i, p in enumerate(parameters):
        own = optimizer.optim.state.get(p)
        whole = {
            "step": torch.zeros((), device=p.device),
            "exp_avg": torch.zeros_like(p),
            "exp_avg_sq": torch.zeros_like(p),
        }
        for name, value in whole.items():
            if own:
                value.copy_(own[name])
            dist.reduce(value, 0)
        if is_main() and whole["step"]:
            states[i] = {name: value.cpu() for name, value in whole.items()}
    groups = torch.optim.Optimizer.state_dict(optimizer)["param_groups"]
    return {"state": states, "param_groups": groups}


def lay_out(value, like):
    """A whole tensor -> laid out over the ranks as `like` is."""
    if not isinstance(like, DTensor):
        return value
    return distribute_tensor(value.to(like.device), like.device_mesh, like.placements, src_data_rank=None)
