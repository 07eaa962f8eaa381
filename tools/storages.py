"""Counts the bytes of all tensors that are alive, on torch's meta device as well as on a real one, and the
operations that made them."""

import weakref

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import flop_registry


class Storages(TorchDispatchMode):
    """Inside, `live` is how many bytes the tensors take that were made or used; `peak` is the most so far.
    `flops` are the floating-point operations of matrix products, convolutions and attention."""

    def __init__(self, kind="meta", without=()):
        """kind: of the device ("cpu", "meta") whose tensors are counted; without: modules whose weights are
        not."""
        super().__init__()
        self.kind = kind
        self.live = 0
        self.peak = 0
        self.flops = 0
        self.results = {}  # on the meta device: {what is computed: what tensors that makes}
        self.known = weakref.WeakSet()
        for module in without:
            for weight in (*module.parameters(), *module.buffers()):
                self.known.add(weight.untyped_storage())

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        inputs = tree_leaves((args, kwargs))
        tensors = [x for x in inputs if isinstance(x, torch.Tensor)]
        if tensors and all(x.is_meta for x in tensors):
            out = self._compute_on_meta(func, args, kwargs, inputs, tensors)
        else:
            out = func(*args, **kwargs)
        for x in [*tensors, *tree_leaves(out)]:
            if isinstance(x, torch.Tensor) and x.device.type == self.kind:
                self._count(x.untyped_storage())
        count_flops = flop_registry.get(func._overloadpacket)
        if count_flops:
            self.flops += count_flops(*args, **kwargs, out_val=out)
        return out

    def _compute_on_meta(self, func, args, kwargs, inputs, tensors):
        """The same as func(*args, **kwargs). Many functions are slow on the meta device, so that what one
        made of tensors of these shapes before is simply made again."""
        shapes = [describe(x) if isinstance(x, torch.Tensor) else x for x in inputs]
        key = (func, *kwargs, *shapes)
        if self.results.get(key):
            made = [make_on_meta(description) for description in self.results[key]]
            return made if len(made) > 1 else made[0]
        out = func(*args, **kwargs)
        if key not in self.results:
            outputs = tree_leaves(out)
            old = {x.untyped_storage() for x in tensors}
            views = not all(is_new_on_meta(x, old) for x in outputs)
            self.results[key] = None if views else [describe(x) for x in outputs]
        return out

    def _count(self, storage):
        if storage in self.known:
            return
        self.known.add(storage)
        nbytes = storage.nbytes()
        weakref.finalize(storage, self._change, -nbytes)
        self._change(nbytes)

    def _change(self, nbytes):
        self.live += nbytes
        self.peak = max(self.peak, self.live)


def describe(x):
    """What makes a tensor of the meta device what it is."""
    return x.shape, x.stride(), x.dtype


def make_on_meta(description):
    shape, stride, dtype = description
    return torch.empty_strided(shape, stride, dtype=dtype, device="meta")


def is_new_on_meta(x, old):
    """Whether this is a tensor of the meta device that shares none of the storages `old`."""
    return isinstance(x, torch.Tensor) and x.is_meta and x.untyped_storage() not in old
