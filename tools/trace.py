"""Runs a stage's own iteration on torch's meta device, to see what is alive in it and its passes."""

import argparse
import contextlib
import functools
import os
from dataclasses import dataclass

import torch

from common import find_family
from support.inputs import find_start
from support.parallel import shares_weights
from support.training import fill_training_arguments
from tools.meta import META, DataOnMeta, make_teacher_on_meta, read_configs
from tools.passes import Passes, count_passes
from tools.storages import Storages


@dataclass
class Trace:
    """What was seen of an iteration."""

    peak: int  # bytes, the most that were alive at a time beside weights, gradients and optimisers
    kept: float  # bytes that a micro-batch keeps from one update to the next
    flops: int  # floating-point operations, forward, backward, and what checkpointing computes again
    passes: Passes


class Networks:
    """The networks of a training run on the meta device, and traces of its iteration."""

    def __init__(self, args, stage, iterate):
        """stage and iterate: ADM or ADP, and its iteration. UserError for a teacher whose sizes are not
        known."""
        configs = read_configs(args.teacher)
        fill_training_arguments(args, find_family(configs["pipeline"]))
        if getattr(args, "init", None) and os.path.exists(args.init):  # which may be still to come
            _, meta = find_start(args)
            args.steps = args.steps or meta["steps"]
        self.stage = stage
        self.iterate = iterate
        self.teacher = make_teacher_on_meta(args, configs)
        self.text_encoders = sum(configs["text_encoders"].values())  # their parameters
        method = self.make_method(shorten(args))
        self.fake_score = getattr(method, "f", None)
        self.heads = method.heads
        self.backbone = getattr(method, "backbone", None)
        self.steps = method.student.steps
        self.traces = {}

    def make_method(self, args):
        return self.stage(args, self.teacher, DataOnMeta(self.teacher.latent_shape))

    def trace(self, args):
        """An iteration with these arguments -> Trace. It is not run twice for what makes no difference."""
        return self._trace(shorten(args))

    def _trace(self, short):
        updates = getattr(short, "ttur", 1)
        key = (short.batch, short.accumulate, shares_weights(short), short.lora > 0, updates)
        if key not in self.traces:
            self.traces[key] = trace_iteration(self.make_method(short), self.iterate)
        return self.traces[key]

    def count_flops(self, args):
        """Floating-point operations of an iteration with these arguments on one GPU: the mean over the times
        t' where the student has several."""
        updates = getattr(args, "ttur", 1)
        short = change(shorten(args), ttur=updates)
        flops = self._trace(short).flops / short.accumulate
        if self.steps > 1:
            flops += updates * (self.steps - 1) / 2 * self._count_flops_of_step(short)
        return args.accumulate * flops

    def _count_flops_of_step(self, short):
        """The same of a step of the student in backward simulation, for a micro-batch."""
        method = self.make_method(short)
        method.student.steps = 1
        with torch.no_grad(), Storages() as storages:
            method.generate(method.draw(0, 0)[0])
        return storages.flops

    @functools.cached_property
    def preview_peak(self):
        """The most bytes alive while a checkpoint's samples are decoded, which is done one by one."""
        latents = torch.empty(1, *self.teacher.latent_shape, device=META)
        with torch.no_grad(), Storages(without=[self.teacher.pipe.vae]) as storages:
            self.teacher.decode(latents)
        return storages.peak


def shorten(args):
    """The arguments of an iteration in which each network learns once; of micro-batches, which are all alike,
    there are at most two."""
    accumulate = min(args.accumulate, 2)
    return change(args, init=None, warmup=0, ttur=1, ema=0, accumulate=accumulate)


def change(args, **values):
    """A copy of the arguments with other values."""
    return argparse.Namespace(**{**vars(args), **values})


def trace_iteration(method, iterate):
    """An iteration of a method on the meta device -> Trace."""
    method.student.steps = 1  # backward simulation keeps nothing
    weights = [method.G, method.teacher.denoiser, method.teacher.pipe.vae]
    for name in ("f", "heads"):
        if getattr(method, name, None):
            weights.append(getattr(method, name))
    if getattr(method, "backbone", None):
        weights.append(method.backbone.encoder)
    kept = []

    def minimise(loss_of, batch, net, optimizer, clip):
        """The stage's own, but that it neither exchanges, nor clips, nor steps."""
        with forget_gradients(net):
            for b in batch:
                (loss_of(b) / len(batch)).backward()
        kept.append(storages.live / len(batch))
        return torch.zeros((), device=META)

    with Storages(without=weights) as storages, count_passes(method) as passes:
        iterate(method, 0, minimise)
    return Trace(storages.peak, max(kept), storages.flops, passes)


@contextlib.contextmanager
def forget_gradients(net):
    """Inside, a weight's gradient is dropped as soon as it is there; they are counted elsewhere."""

    def forget(p):
        p.grad = None

    handles = [p.register_post_accumulate_grad_hook(forget) for p in net.parameters()]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()
