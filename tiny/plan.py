"""What --plan prints: the memory of each GPU, part by part, without weights, GPU or network.

Weights, gradients and optimisers are counted; activations are those of the real passes, run on the meta device.
"""
import argparse
import contextlib
import copy
import functools
import inspect
import itertools
import os
import types
import weakref

import torch
import torch.nn.functional as F
from torch import nn
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.checkpoint import checkpoint

from common import FAMILIES, TEACHERS, Heads, PixelBackbone, UserError, blocks_of, dtype_of, frozen, hinge_discriminator, hinge_generator, inner_layers, read_json

CONFIGS = os.path.join(os.path.dirname(os.path.dirname(os.path.abspath(__file__))), "assets", "configs")  # of the known teachers
META = torch.device("meta")  # shapes without numbers
GB = 1e9


def count(module):
    """Parameters."""
    return sum(p.numel() for p in module.parameters())


def adapter_parameters(args, teacher):
    """Parameters of one network's --lora adapters."""
    return sum(args.lora * (m.in_features + m.out_features) for m in inner_layers(teacher.denoiser).values())


def flat(values):
    """What is in nested lists and tuples, in one list."""
    return [x for value in values for x in (flat(value) if isinstance(value, (list, tuple)) else [value])]


class Storages(TorchDispatchMode):
    """Inside, `live` is how many bytes the tensors take that were made or used, and `peak` the most so far. The weights of `without`
    (modules) are left out."""

    def __init__(self, *without):
        super().__init__()
        self.live, self.peak, self.made = 0, 0, {}
        self.known = weakref.WeakSet(t.untyped_storage() for module in without for t in (*module.parameters(), *module.buffers()))

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        inputs = flat(args) + flat(kwargs.values())
        tensors = [x for x in inputs if isinstance(x, torch.Tensor)]
        if tensors and all(x.is_meta for x in tensors):  # where many functions are slow: by what was made of tensors of these shapes before
            key = (func, *kwargs, *((x.shape, x.stride(), x.dtype) if isinstance(x, torch.Tensor) else x for x in inputs))
            if self.made.get(key):
                made = [torch.empty_strided(shape, stride, dtype=dtype, device=META) for shape, stride, dtype in self.made[key]]
                out = made if len(made) > 1 else made[0]
            else:
                out = func(*args, **kwargs)
                if key not in self.made:
                    old, outputs = {x.untyped_storage() for x in tensors}, flat([out])
                    new = all(isinstance(x, torch.Tensor) and x.is_meta and x.untyped_storage() not in old for x in outputs)
                    self.made[key] = [(x.shape, x.stride(), x.dtype) for x in outputs] if new else None  # not of views
        else:
            out = func(*args, **kwargs)
        for x in tensors + [x for x in flat([out]) if isinstance(x, torch.Tensor)]:
            storage = x.untyped_storage()
            if storage not in self.known:
                self.known.add(storage)
                weakref.finalize(storage, self._change, -storage.nbytes())
                self._change(storage.nbytes())
        return out

    def _change(self, nbytes):
        self.live += nbytes
        self.peak = max(self.peak, self.live)


class GPUAutocast(TorchFunctionMode):
    """What torch.autocast("cuda", dtype) does, for tensors on the meta device, which it does not know: matrix products and convolutions
    in `dtype`, norms and softmax in float32; weights that train are cast once, and kept until the end. Attention is the flash kernel's,
    which never makes the matrix of all pairs. With dtype float32 it is attention alone."""

    LOWER = {F.linear, torch.conv1d, torch.conv2d, torch.conv3d, torch.matmul, torch.Tensor.matmul, torch.Tensor.__matmul__, torch.bmm, torch.baddbmm,
             torch.einsum, F.scaled_dot_product_attention}
    FLOAT = {F.layer_norm, F.group_norm, F.softmax, torch.softmax, torch.Tensor.softmax, torch.Tensor.pow, torch.rsqrt}

    def __init__(self, dtype):
        super().__init__()
        self.dtype, self.kept = dtype, {}

    def cast(self, x, dtype):
        if not isinstance(x, torch.Tensor) or x.dtype not in (torch.float32, torch.bfloat16) or x.dtype == dtype:
            return x
        if not (x.is_leaf and x.requires_grad):
            return x.to(dtype)
        if id(x) not in self.kept:
            self.kept[id(x)] = x.to(dtype)
        return self.kept[id(x)]

    def __torch_function__(self, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        if self.dtype != torch.float32 and func in self.LOWER | self.FLOAT:
            dtype = self.dtype if func in self.LOWER else torch.float32
            args, kwargs = [self.cast(x, dtype) for x in args], {name: self.cast(x, dtype) for name, x in kwargs.items()}
        if func is F.scaled_dot_product_attention:
            return flash_attention(*args, **kwargs)
        return func(*args, **kwargs)

    def __exit__(self, *error):
        self.kept.clear()
        return super().__exit__(*error)


def flash_attention(query, key, value, *_, **__):
    return torch.ops.aten._scaled_dot_product_flash_attention(query, key, value)[0]


def read_configs(name):
    """A known teacher or a local pipeline folder -> its configs, without weights: {"pipeline": class, "denoiser", "scheduler", "vae": config,
    "text_encoders": {name: parameters}, "text_length": tokens of the first}. UserError for anything else."""
    path = TEACHERS.get(name, name)
    known = {hub_id: key for key, hub_id in TEACHERS.items()}
    if path in known and not os.path.isdir(path):
        return read_json(os.path.join(CONFIGS, f"{known[path]}.json"))
    import transformers

    index = read_json(os.path.join(path, "model_index.json")) or {}
    if index.get("_class_name") not in FAMILIES:
        raise UserError(f"--plan knows {', '.join(TEACHERS)}, and pipeline folders with a model_index.json; {name!r} is none of them")

    def config(part, file="config.json"):
        found = read_json(os.path.join(path, part, file))
        if found is None:
            raise UserError(f"{path} is not a complete pipeline folder: {part}/{file} is missing or damaged")
        return found

    configs = {"pipeline": index["_class_name"], "denoiser": config(FAMILIES[index["_class_name"]].denoiser_name), "vae": config("vae"), "text_encoders": {},
               "scheduler": config("scheduler", "scheduler_config.json"), "text_length": config("tokenizer", "tokenizer_config.json")["model_max_length"]}
    for part, kind in index.items():
        if part.startswith("text_encoder") and kind[0]:
            model = getattr(transformers, kind[1])
            with META:
                configs["text_encoders"][part] = sum(map(torch.numel, model(model.config_class.from_dict(config(part))).parameters()))
    return configs


def teacher_on_meta(args, configs):
    """The teacher of these arguments as shapes without numbers, and its condition of one row."""
    import diffusers

    family, pipeline = FAMILIES[configs["pipeline"]], getattr(diffusers, configs["pipeline"])
    dtype, parts = dtype_of(args.precision, torch.device("cuda")), {}
    for name, config in ((family.denoiser_name, configs["denoiser"]), ("vae", configs["vae"]), ("scheduler", configs["scheduler"])):
        with META if name != "scheduler" else contextlib.nullcontext():
            parts[name] = getattr(diffusers, config["_class_name"]).from_config(config)
        if name != "scheduler":
            nn.Module.to(parts[name], dtype)  # diffusers' own warns
    absent = [name for name, p in inspect.signature(pipeline).parameters.items() if p.default is p.empty and name not in parts]
    teacher = family(pipeline(**parts, **dict.fromkeys(absent)), args.teacher, META, dtype, args.resolution, *[args.frames] * family.video)
    teacher.autocast = lambda: GPUAutocast(dtype)
    if args.checkpointing:
        again = functools.partial(checkpoint, use_reentrant=False, context_fn=lambda: (contextlib.nullcontext(), GPUAutocast(dtype)))
        teacher.denoiser.enable_gradient_checkpointing(again)
        if not teacher.video:
            teacher.pipe.vae.enable_gradient_checkpointing(again)
    if teacher.video:
        teacher.pipe.vae.enable_tiling()
    config, length = teacher.denoiser.config, configs["text_length"]
    if configs["pipeline"] == "StableDiffusionXLPipeline":
        pooled = config.projection_class_embeddings_input_dim - 6 * config.addition_time_embed_dim
        shapes = {"encoder_hidden_states": (length, config.cross_attention_dim), "text_embeds": (pooled,), "time_ids": (6,)}
    elif configs["pipeline"] == "StableDiffusion3Pipeline":  # T5's tokens follow CLIP's
        shapes = {"encoder_hidden_states": (length + 256, config.joint_attention_dim), "pooled_projections": (config.pooled_projection_dim,)}
    else:
        shapes = {"encoder_hidden_states": (config.max_text_seq_length, config.text_embed_dim)}
    teacher._null = {name: torch.empty(1, *shape, device=META, dtype=dtype) for name, shape in shapes.items()}
    return teacher


def pixel_backbone_on_meta(name, dtype):
    """ADP's pixel backbone. Of an official SAM nothing but its sizes; a file is read; DINOv2's base counts as vit_b, which is as large."""
    from segment_anything.modeling import ImageEncoderViT

    if os.path.exists(name) or name not in PixelBackbone.SAM and not name.startswith(("dinov2", "facebook/dinov2")):
        return PixelBackbone(name, META, dtype)
    dim, depth, heads = {"sam_vit_l": (1024, 24, 16), "sam_vit_h": (1280, 32, 16)}.get(name, (768, 12, 12))
    with META:
        encoder = ImageEncoderViT(embed_dim=dim, depth=depth, num_heads=heads, use_rel_pos=True, window_size=14,
                                  global_attn_indexes=range(depth // 4 - 1, depth, depth // 4))
    return PixelBackbone("sam_vit_b", META, dtype, encoder)


def trace(args, teacher, heads, backbone, dtype):
    """Runs an update of the student and one of the heads on the meta device -> (the most bytes alive beside weights, gradients and
    optimisers, the bytes that a micro-batch keeps from the one to the other). dtype: of the weights of student and fake score; where it
    is not the passes', autocast's copies count. The passes are those of the loops in adp.py and adm.py, in their order."""
    adm = hasattr(args, "fake_lr")
    G, f = (nn.Module.to(copy.deepcopy(teacher.denoiser), dtype).requires_grad_(True).train() for _ in range(2))  # checkpointing as the teacher's
    for p in (*G.parameters(), *heads.parameters()):
        p.register_post_accumulate_grad_hook(lambda p: setattr(p, "grad", None))  # counted elsewhere
    x, t = torch.empty(args.batch, *teacher.latent_shape, device=META), torch.empty(args.batch, dtype=torch.float64, device=META)
    cond = teacher.null(args.batch)

    def maps_of(x_0, x_t):
        maps = teacher.features(x_t, t, cond)
        return maps + backbone.features(teacher.decode(x_0)) if backbone else maps

    with META, Storages(G, f, teacher.denoiser, teacher.pipe.vae, heads, *([backbone.encoder] if backbone else [])) as storages:
        with frozen(f, heads):
            if adm:
                x0_hat = teacher.predict(G, x, t, cond)[0]
                x_t = teacher.diffuse(x0_hat, x, t)
                fake = teacher.predict(f, x_t, t, cond)
                with torch.no_grad():
                    real = teacher.guided(x_t, t, cond, teacher.adm_guidance if args.guidance is None else args.guidance)
                x_fake, x_real = teacher.step(*fake, t), teacher.step(*real, t)
            else:
                x0_hat = x - teacher.call(G, x, t, cond)
                x_fake, x_real = teacher.diffuse(x0_hat, x, t), x
            if heads:
                maps_fake = maps_of(x0_hat, x_fake)
            loss = hinge_generator(heads(maps_fake)) if heads else x0_hat.mean()
            loss.backward()
        if not heads:
            return storages.peak, 0
        maps_fake = [m.detach() for m in maps_fake]
        kept = sum(m.nbytes for m in maps_fake)
        with torch.no_grad():
            groups = [maps_of(x, x_real), maps_fake] + [maps_of(x, x_real) for weight in (adm and args.r1, adm and args.r2) if weight]
        D_real, D_fake, *_ = heads([torch.cat(maps) for maps in zip(*groups)]).chunk(len(groups))
        hinge_discriminator(D_real, D_fake).backward()
    return storages.peak, kept


def memory_parts(args, configs):
    """Everything of a training run that memory_rows counts, on the meta device, and `activations(args)`, which does not repeat itself."""
    teacher = teacher_on_meta(args, configs)
    adm, heads, backbone = hasattr(args, "fake_lr"), None, None
    if not adm and args.lambda_pixel and not teacher.video:
        backbone = pixel_backbone_on_meta(args.pixel_backbone, teacher.dtype)
    if not adm or args.loss == "adm":
        with META, torch.no_grad():
            x = torch.empty(1, *teacher.latent_shape)
            maps = teacher.features(x, torch.empty(1, dtype=torch.float64), teacher.null(1))
            heads = Heads(maps + (backbone.features(teacher.decode(x)) if backbone else []), args.head_width)

    with META, torch.no_grad(), Storages(teacher.pipe.vae) as preview:  # of a checkpoint's samples, one by one
        teacher.decode(torch.empty(1, *teacher.latent_shape))

    @functools.cache
    def traced(batch, dtype):
        return trace(argparse.Namespace(**{**vars(args), "batch": batch}), teacher, heads, backbone, dtype)

    def activations(args):
        peak, kept = traced(args.batch, teacher.dtype if args.shard == "fsdp" or args.lora else torch.float32)
        return max(peak + (args.accumulate - 1) * kept, preview.peak)

    encoders = sum(configs["text_encoders"].values())
    return types.SimpleNamespace(teacher=teacher, heads=heads, backbone=backbone, text_encoders=encoders, activations=activations)


def memory_rows(args, parts, processes, limit=float("inf")):
    """What is alive at the peak of an iteration, on each of so many GPUs: {part: bytes of (weights, gradients, optimiser)}. Activations,
    which take seconds, are left out where the rest is over `limit` bytes already.

    Gradients go with their optimiser's step (common.updating), so one process never has those of student and fake score together; of
    several, DDP's buckets stay, and FSDP's shards are counted as if they did."""
    teacher, adm, size = parts.teacher, hasattr(args, "fake_lr"), parts.teacher.dtype.itemsize
    n = full = count(teacher.denoiser)
    buffers = tables = sum(b.numel() for b in teacher.denoiser.buffers())
    shared, states_shared = processes if args.shard == "fsdp" else 1, processes if args.shard != "ddp" else 1
    if args.lora:
        n, tables = adapter_parameters(args, teacher), 0

    trained = (4 * n / shared + 4 * tables, 4 * n / shared, 8 * n / states_shared)
    kind = f"rank-{args.lora} adapters" if args.lora else "fp32"
    rows = {f"student, {kind}": trained}
    if adm:
        weights, gradients, optimiser = trained
        rows[f"fake score, {kind}"] = (weights, gradients if processes > 1 else 0, optimiser)
    rows["teacher, frozen"] = (size * (full / shared + buffers), 0, 0)
    if args.ema:
        rows["EMA of the student"] = (4 * n / shared, 0, 0)
    if parts.heads:
        heads = count(parts.heads)
        rows["discriminator heads"] = (4 * heads, 4 * heads, 8 * heads / (processes if args.shard == "zero1" else 1))
    if parts.backbone:
        rows["pixel backbone"] = (size * count(parts.backbone.encoder), 0, 0)
    encoders, vae = size * parts.text_encoders, size * count(teacher.pipe.vae)
    if not args.offload:
        rows |= {"text encoders": (encoders, 0, 0), "VAE": (vae, 0, 0)}
    if args.shard == "fsdp":
        own = {}  # parameters of each unit without those of the units inside it
        for module in (*reversed(blocks_of(teacher.denoiser)), teacher.denoiser):
            own[module] = count(module) - sum(own.get(inner, 0) for inner in module.modules())
        root, largest = own.pop(teacher.denoiser), max(own.values())
        # two units and one's gradients at a time, and what is in no unit of each network
        rows["gathered from the other GPUs"] = (size * (2 * largest + root * (1 if args.lora else 2 + adm)), size * largest, 0)
    if sum(map(sum, rows.values())) <= limit:
        activations = parts.activations(args)
        if args.offload:  # never together: prompts are encoded before the student's pass
            activations = max(encoders, activations + (vae if parts.backbone else 0))
        rows[f"activations, batch {args.batch}" + (", or what was offloaded" if args.offload else "")] = (activations, 0, 0)
    return rows


def checkpoint_bytes(args, parts):
    """What a checkpoint takes on the disk: all that trains and its optimisers' states, and the student once more, in float32."""
    student = sum(w.numel() for w in parts.teacher.denoiser.state_dict().values())
    networks = 2 if hasattr(args, "fake_lr") else 1
    trained = adapter_parameters(args, parts.teacher) if args.lora else student
    return 4 * (student + trained * (3 * networks + bool(args.ema)) + (3 * count(parts.heads) if parts.heads else 0))


def smaller_options(args):
    """Options that take less memory than these arguments, gentlest first: (text, {name: value})."""
    smaller = [(b, args.accumulate * args.batch // b) for b in range(args.batch - 1, 0, -1) if args.batch % b == 0]  # the same global batch
    options = [(f"--batch {b} --accumulate {n}", {"batch": b, "accumulate": n}) for b, n in smaller]
    options += [("--offload", {"offload": True})] * (not args.offload)
    options += [(f"--shard {shard}", {"shard": shard}) for shard in ("zero1", "fsdp")[("ddp", "zero1", "fsdp").index(args.shard) :]]
    return options + [("--lora 64", {"lora": 64})] * (not args.lora)


def print_plan(args):
    """--plan: what each of args.plan GPUs will hold, part by part, whether it fits args.gpu_gb, and if not, what would. Without weights,
    GPU or network. A GB is 1e9 bytes; an "80 GB" card has 85 of them, which leaves 5 to CUDA and to fragmentation."""
    configs, limit = read_configs(args.teacher), args.gpu_gb * GB
    if FAMILIES[configs["pipeline"]].video and getattr(args, "lambda_pixel", 0):
        raise UserError(PixelBackbone.NO_VIDEO)
    args.batch = args.batch or FAMILIES[configs["pipeline"]].batch
    parts = memory_parts(args, configs)
    rows = memory_rows(args, parts, args.plan)
    total = sum(map(sum, rows.values()))
    print(f"{args.teacher}, --shard {args.shard}, GB on each of {args.plan} GPUs\n{'':42}{'weights':>10}{'gradients':>10}{'optimiser':>10}{'sum':>10}")
    for name, row in (rows | {"sum": [sum(column) for column in zip(*rows.values())]}).items():
        print(f"{name:42}" + "".join(f"{value / GB:10.2f}" if value else f"{'':10}" for value in (*row, sum(row))))
    print(f"a checkpoint takes {checkpoint_bytes(args, parts) / GB:.1f} GB of disk; --keep {args.keep} has {args.keep + 1} of them while one is written")
    if total <= limit:
        print(f"fits {args.gpu_gb:g} GB, with {(limit - total) / GB:.1f} to spare")
        return
    options = smaller_options(args)
    for chosen in (*itertools.combinations(options, 1), *itertools.combinations(options, 2)):
        changes = [item for _, change in chosen for item in change.items()]
        if len(dict(changes)) < len(changes):  # two values of one option
            continue
        needed = sum(map(sum, memory_rows(argparse.Namespace(**{**vars(args), **dict(changes)}), parts, args.plan, limit).values()))
        if needed <= limit:
            print(f"does not fit {args.gpu_gb:g} GB; with {' '.join(text for text, _ in chosen)} it does, in {needed / GB:.1f}")
            return
    print(f"does not fit {args.gpu_gb:g} GB, nor with any two of {', '.join(text for text, _ in options)}")
