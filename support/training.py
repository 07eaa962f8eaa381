"""What both training stages do beside the method: optimisers, learning rates, gradients, averages, gauges."""

import contextlib
import resource

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import nn
from torch.distributed.fsdp import FSDPModule
from torch.distributed.optim import ZeroRedundancyOptimizer
from torch.distributed.tensor import DTensor

from support.backbones import check_backbone
from support.errors import UserError
from support.inputs import find_start
from support.loading import list_networks
from support.offload import Offload, decode_in_tiles
from support.parallel import is_in_ddp, list_parameters, shard, sync_gradients, wrap_ddp


def set_up_for_training(teacher, args):
    """Gradients run through a frozen teacher as D's backbone, and through its decoder: they are
    checkpointed. What stays on the device is moved there, with --shard fsdp only a share of the denoiser."""
    if args.checkpointing:
        checkpoint_teacher(teacher)
    decode_in_tiles(teacher)
    networks = list_networks(teacher.pipe)
    del networks[teacher.denoiser_name]
    waiting = []
    if args.offload:
        waiting = [name for name in networks if name.startswith("text_encoder")]
        if not getattr(args, "lambda_pixel", 0):  # the pixel discriminator decodes in every iteration
            waiting.append("vae")
        teacher.offload = Offload(teacher.pipe, waiting, teacher._encode, teacher.device)
    for name, module in networks.items():
        if name not in waiting:
            module.to(teacher.device)
    teacher.fingerprint  # noqa: B018  read it while its weights are whole
    shard(teacher.denoiser, args, None).to(teacher.device)


def checkpoint_teacher(teacher, checkpoint=None):
    """Gradient checkpointing of what gradients run through: the denoiser, and of a teacher of pictures the
    decoder. checkpoint: in the place of torch's."""
    teacher.denoiser.enable_gradient_checkpointing(checkpoint)
    vae = teacher.pipe.vae
    if vae._supports_gradient_checkpointing and not teacher.video:
        vae.enable_gradient_checkpointing(checkpoint)


def fill_training_arguments(args, family):
    """The defaults that a stage takes from the teacher's class, before weights are read. UserError for what
    it cannot do with such a teacher, and for a pixel backbone that is not there."""
    if getattr(args, "lambda_pixel", 0):
        if family.video:
            raise UserError("the pixel discriminator sees single pictures, not video: give --lambda-pixel 0")
        if not args.plan:  # which needs none
            check_backbone(args.pixel_backbone)
    args.batch = args.batch or family.batch
    if "guidance" in args and args.guidance is None:
        args.guidance = family.adm_guidance
    if family.embeds_guidance:
        default = getattr(args, "guidance", family.guidance)
        args.student_guidance = args.student_guidance or recall_student_guidance(args) or default
    elif args.student_guidance:
        raise UserError("--student-guidance is for teachers that are told their guidance, as FLUX.1-dev")


def recall_student_guidance(args):
    """What the student that training starts from was told before; None where there is none."""
    found = find_start(args)
    if found is None:
        return None
    _, meta = found
    return meta["arguments"].get("student_guidance")


def prepare(net, lr, args):
    """A network that trains -> (what its updates go through: DDP, or itself if there is one rank or it is
    sharded; its AdamW). With any --shard each rank keeps the state of its share of the parameters only: of
    a network that is sharded it has no others, and of the rest, as heads and adapters, ZeRO-1 sees to it.
    None -> twice None."""
    if net is None:
        return None, None
    options = {"lr": lr, "betas": args.betas, "weight_decay": args.weight_decay, "fused": True}
    shares_states = args.shard != "ddp" and not isinstance(net, FSDPModule)
    if shares_states and dist.is_initialized():
        optimizer = ZeroRedundancyOptimizer(list(net.parameters()), torch.optim.AdamW, **options)
    else:
        optimizer = torch.optim.AdamW(net.parameters(), **options)
    return wrap_ddp(net), optimizer


def set_lr(args, step, rates):
    """Sets the learning rates of an iteration, {optimiser (None is passed over): rate}: constant, then
    linearly to zero over the last `args.decay` of the iterations.

    (LambdaLR does not fit: it counts the optimiser's own steps, of which a student in the warm-up makes
    none.)"""
    decaying = max(1, args.decay * args.iterations)
    factor = min(1.0, (args.iterations - step) / decaying)
    for optimizer, rate in rates.items():
        if optimizer:
            optimizer.param_groups[0]["lr"] = rate * factor


def minimise(loss_of, batch, net, optimizer, clip):
    """One update of `net` by the mean of the micro-batches' losses -> the gradient's norm, unclipped."""
    for b in batch:
        with sync_gradients(net, now=b is batch[-1]):
            loss = loss_of(b) / len(batch)
            loss.backward()
    norm = clip_gradient(optimizer, clip)
    if norm.isfinite():  # one bad batch must not end a run
        optimizer.step()
    optimizer.zero_grad(set_to_none=not is_in_ddp(net))  # its buckets stay
    return norm


def clip_gradient(optimizer, clip):
    """Clips the gradient of all that the optimiser trains to this norm -> the norm before."""
    parameters = list_parameters(optimizer)
    norm = nn.utils.clip_grad_norm_(parameters, clip)
    return norm.full_tensor() if isinstance(norm, DTensor) else norm


class Means:
    """The metrics of an iteration, each the mean of all that was added under its name."""

    def __init__(self):
        self.values = {}

    def __call__(self, **values):
        """Scalar tensors by name -> the last one, so that a loss can be noted as it is returned."""
        for name, value in values.items():
            self.values.setdefault(name, []).append(value.detach())
        return value

    def take(self):
        """{name: mean}; the next ones begin anew."""
        means = {name: torch.stack(values).mean() for name, values in self.values.items()}
        self.values = {}
        return means


def watch_gradient(x_fake, difference, log):
    """When the backward pass comes to x_fake [B, ...] it logs two gauges of a discriminator's health: the
    cosine of the gradient's descent with the difference x_real - x_fake, and which share of the gradient's
    square is across that line."""

    def watch(gradient):
        cosine = F.cosine_similarity(-gradient.flatten(1), difference.flatten(1))
        across = 1 - cosine.square()
        log(cosine=cosine.mean(), across=across.mean())

    if x_fake.requires_grad:
        x_fake.register_hook(watch)


class MovingAverage:
    """The moving average of a network's weights, to sample and to save; with decay 0 the weights
    themselves. Short runs forget their start: the decay grows to `decay` as (1 + n) / (10 + n) with the
    number n of updates."""

    def __init__(self, net, decay):
        from diffusers.training_utils import EMAModel

        self.net = net
        self.average = EMAModel(net.parameters(), decay=decay) if decay else None

    def step(self):
        if self.average:
            self.average.step(self.net.parameters())

    @contextlib.contextmanager
    def use(self):
        """Inside, the network has the average's weights."""
        if self.average is None:
            yield
            return
        self._exchange()
        try:
            yield
        finally:
            self._exchange()

    @torch.no_grad()
    def _exchange(self):
        """The weights for their averages, in place and one by one: EMAModel would copy all of them to the
        CPU, on every rank."""
        for weight, average in zip(self.net.parameters(), self.average.shadow_params):
            kept = weight.clone()
            weight.copy_(average)
            average.copy_(kept)

    def state_dict(self):
        return self.average.state_dict() if self.average else {}

    def load_state_dict(self, state):
        if bool(state) != bool(self.average):
            raise ValueError("--ema is not what it was")
        if self.average:
            self.average.load_state_dict({**state, "decay": self.average.decay})
            self.average.to(next(self.net.parameters()).device)


def peak_memory_mb():
    """The most memory that this rank has used, in MiB: the GPU's if there is one, else the process's own."""
    if torch.cuda.is_available():
        return torch.cuda.max_memory_allocated() / 2**20
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**10
