"""Counts the passes that a training stage makes through its networks, forward and backward."""

import contextlib
import math
from collections import Counter

import torch
from torch import nn


class Passes:
    """The passes that a method (an ADM or ADP) has made, by going between it and its teacher's `call`.

    full, partial: forward passes to a network's end, and those that end before it, at the discriminator's
    deepest tap. backward: those that gradients have come back through, {(network, "parameters" or
    "inputs"): number}, where the network is "G", "f" or the discriminator's backbone "D", which is the
    teacher. A pass of twice the batch, as guidance makes, counts as two; gradient checkpointing's second
    forward passes do not count."""

    def __init__(self, method):
        self.batch = method.args.batch
        self.next_call = method.teacher.call
        self.clear()
        self.names = {method.teacher.denoiser: "D", method.G: "G"}
        if hasattr(method, "f"):
            self.names[method.f] = "f"
        # with --lora, G and f are adapters in the teacher: there its parameters are not all its own
        self.adapters = set()
        for net, name in self.names.items():
            if name != "D":
                self.adapters.update(net.parameters())

    def clear(self):
        self.full = 0
        self.partial = 0
        self.backward = Counter()

    def call(self, net, x, timestep, cond):
        """The teacher's `call`, counted."""
        count = math.ceil(len(x) / self.batch)
        if torch.is_grad_enabled():
            x = self._watch_gradient(net, x, count)
        try:
            raw = self.next_call(net, x, timestep, cond)
        except Exception:  # as the deepest tap ends a pass
            self.partial += count
            raise
        self.full += count
        return raw

    def _watch_gradient(self, net, x, count):
        """x as a tensor of its own, which sees only gradients that have come back through the whole of this
        pass."""
        if isinstance(net, nn.parallel.DistributedDataParallel):
            net = net.module
        name = self.names.get(net, type(net).__name__)
        parameters = net.parameters()
        if name == "D":
            parameters = [p for p in parameters if p not in self.adapters]
        learns = any(p.requires_grad for p in parameters)
        if not learns and not x.requires_grad:
            return x
        key = (name, "parameters" if learns else "inputs")
        x = x.view_as(x) if x.requires_grad else x.detach().requires_grad_()
        x.register_hook(lambda gradient: self.backward.update({key: count}))
        return x


@contextlib.contextmanager
def count_passes(method):
    """Inside, the passes of a method are counted -> Passes."""
    passes = Passes(method)
    method.teacher.call = passes.call
    try:
        yield passes
    finally:
        del method.teacher.call
