"""What the tests share beside the fixtures: tiny networks, commands, and what a run left on the disk."""

import functools
import hashlib
import json
import os
import subprocess
import sys
import types

import numpy as np
import torch
from safetensors.torch import save_file
from segment_anything.modeling import ImageEncoderViT
from torch import nn

import adm
import adp
import collect_ode
import common
from support import loading, run
from support.arguments import parse_adm_arguments, parse_adp_arguments
from support.checkpoints import describe_files, save_network
from support.files import write_atomically, write_json, write_sealed
from support.lora import Adapted
from support.lora_files import save_adapter
from support.pairs import Pairs
from support.parallel import join_processes
from support.prompts import read_prompts
from support.rng import RowRNG
from tiny import train

ROOT = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))
# what of a stage's arguments its networks depend on
TRAINING = types.SimpleNamespace(lora=0, shard="ddp", checkpointing=True, compile=False)
# a training of seconds
QUICK = ["--batch", "2", "--iterations", "2", "--log-every", "1", "--head-width", "128"]
QUICK += ["--lr", "1e-4", "--head-lr", "1e-4"]
PARSERS = {"adm": parse_adm_arguments, "adp": parse_adp_arguments}
CPU = torch.device("cpu")
PROMPT = "a red circle"

# ----------------------------------------------------------------------------------------------------------
# Networks and methods
# ----------------------------------------------------------------------------------------------------------


def load_teacher(*args, **options):
    """common.open_teacher's, on its device, and tried out."""
    return loading.place(common.open_teacher(*args, **options))


def make_teacher(folder, seed, family="sdxl"):
    """A tiny pipeline with random weights -> its folder."""
    torch.manual_seed(seed)
    pipe = make_shallow(train.FAMILIES[family]["build"]())
    pipe.to(dtype=torch.float16).save_pretrained(folder)
    return str(folder)


def make_shallow(pipe):
    """The pipeline with a transformer, if it has one, of two or three blocks in place of four: a pass takes
    its time for modules, however small."""
    if hasattr(pipe, "transformer"):
        config = dict(pipe.transformer.config)
        for name, blocks in (("num_layers", 2), ("n_layers", 2), ("num_single_layers", 1)):
            if name in config:
                config[name] = blocks
        pipe.transformer = type(pipe.transformer).from_config(config)
    return pipe


def size(family):
    """The words of a command line for the samples' size of a tiny teacher whose configs do not say it."""
    found = train.FAMILIES[family].get("size", {})
    words = []
    if "resolution" in found:
        words += ["--resolution", "x".join(map(str, found["resolution"]))]
    if "frames" in found:
        words += ["--frames", str(found["frames"])]
    return words


def make_sam(seed, **sizes):
    """An image encoder of SAM's kind for 64x64 pixels, windows of 3 in the blocks 0 and 2, no weight zero."""
    torch.manual_seed(seed)
    default = {
        "img_size": 64,
        "patch_size": 8,
        "embed_dim": 24,
        "depth": 4,
        "num_heads": 3,
        "out_chans": 16,
        "window_size": 3,
        "global_attn_indexes": (1, 3),
    }
    norm_layer = functools.partial(nn.LayerNorm, eps=1e-6)
    encoder = ImageEncoderViT(**{**default, **sizes}, use_rel_pos=True, norm_layer=norm_layer).eval()
    for parameter in encoder.parameters():
        nn.init.normal_(parameter, std=0.2)
    return encoder


def save_sam(encoder, path):
    """Writes SAM's layout, in which there are more parts, in the format of the suffix -> the path."""
    state = {f"image_encoder.{name}": weight.contiguous() for name, weight in encoder.state_dict().items()}
    state["mask_decoder.bias"] = torch.zeros(3)
    if str(path).endswith("safetensors"):
        save_file(state, path)
    else:
        torch.save(state, path)
    return str(path)


def training_arguments(stage, words):
    """The parsed arguments of adm.py or adp.py. stage: "adm" or "adp"; words: of its command line."""
    method = [adm.ADM] if stage == "adm" else []
    return PARSERS[stage](__doc__, words, common.FAMILIES, *method)


def make_method(stage, words):
    """The ADM or ADP that a command would train, without a run's folder. stage: the module adm or adp."""
    args = training_arguments(stage.__name__, words)
    teacher = common.load_training_teacher(args, join_processes(args.seed))
    if stage is adp:
        return adp.ADP(args, teacher, Pairs(args.pairs, teacher))
    return adm.ADM(args, teacher, read_prompts(args.prompts))


# ----------------------------------------------------------------------------------------------------------
# Students, and what they draw
# ----------------------------------------------------------------------------------------------------------


def save_checkpoint(folder, teacher, parametrisation="teacher", steps=1, state=None, layers=None, first=1.0):
    """A step folder as training leaves it -> its path. state: the student's, by default the teacher's;
    layers: of its adapter, if it is one; first: its first time. Where students are told their guidance, this
    one is told 2."""
    os.makedirs(os.path.join(folder, "state"))
    if layers:
        save_adapter(common.Student(teacher, parametrisation, steps), layers, folder)
    else:
        state = state or teacher.network().state_dict()
        save_network(teacher.denoiser, state, os.path.join(folder, "student"))
    meta = {"teacher": teacher.path, "fingerprint": teacher.fingerprint}
    meta |= {"resolution": teacher.resolution, "frames": teacher.frames}
    meta |= {"parametrisation": parametrisation, "steps": steps, "step": 1, "stage": "adm"}
    meta["first_time"] = first
    meta["arguments"] = {"student_guidance": 2.0} if teacher.embeds_guidance else {}
    if layers:
        rank = min(min(weight.shape) for weight in layers.values())
        meta["arguments"] |= {"lora": rank, "lora_targets": None}
    write_sealed(os.path.join(folder, "meta.json"), meta | {"files": describe_files(folder)})
    return str(folder)


def load_student(path, teacher):
    """A checkpoint -> (network to sample with, Student, meta)."""
    folder, student, meta = common.open_student(str(path), teacher)
    return common.load_student(folder, teacher), student, meta


def adapt(teacher, rank):
    """A student that is a random adapter -> (its whole state, its layers), left in the teacher's network."""
    teacher.fingerprint  # noqa: B018  read it while its network is whole
    net = Adapted(teacher.denoiser, "student", rank)
    torch.manual_seed(1)
    for weight in net.parameters():
        nn.init.normal_(weight, std=0.2)
    state = {}
    for name, weight in teacher.denoiser.state_dict().items():
        if "lora_" not in name:
            state[name.replace(".base_layer", "")] = weight
    for name, layer in net.layers.items():
        state[f"{name}.weight"] = state[f"{name}.weight"] + layer.get_delta_weight("student")
    return state, net.read_layers()


class Recorded(RowRNG):
    """Remembers what noise it gave."""

    def __init__(self, *args):
        super().__init__(*args)
        self.given = []

    def normal(self, *shape):
        noise = super().normal(*shape)
        self.given.append(noise)
        return noise


def draw_student(student, net):
    """The student's own sample -> (pictures [F, H, W, 3] in [0, 1], the noise that it took as its pipeline
    asks for it)."""
    teacher = student.teacher
    rng = Recorded([0], ("test", 7), CPU)
    latents = student.sample(net, rng, teacher.encode([PROMPT]))
    pixels = (teacher.decode(latents)[0] / 2 + 0.5).clamp(0, 1)
    frames = pixels.transpose(0, 1) if teacher.video else pixels[None]
    given = [teacher.pack(noise) for noise in rng.given]
    if teacher.packing > 1:
        given[0] = rng.given[0]  # the pipeline packs it itself
    return frames.permute(0, 2, 3, 1).numpy(), given


READER = """
import json, sys
import numpy, torch
from diffusers.utils import torch_utils
from safetensors.torch import load_file

def take_noise(shape, dtype=None, **_):  # the flow scheduler multiplies one more by zero
    return next(noise, torch.zeros(shape)).to(dtype).view(shape)

torch.set_num_threads(1)
torch_utils.randn_tensor = take_noise  # before a pipeline imports it
prompt = "a red circle"
for i, lines in enumerate(json.load(open("lines.json"))):
    tensors = load_file(f"{i}.noise")
    noise = iter([tensors[str(k)] for k in range(len(tensors))])
    exec("\\n".join(lines[:-1]))
    drawn = eval(lines[-1].replace("(prompt,", "(prompt, output_type='np',"))
    numpy.save(f"{i}.npy", drawn.frames[0] if "num_frames" in lines[-1] else drawn.images)
assert "common" not in sys.modules and "support" not in sys.modules
"""


def draw_elsewhere(folder, programs, noises):
    """What plain diffusers draws in one process without this project -> [pictures [F, H, W, 3] in [0, 1]].
    programs: lines of Python each, of which the last draws; noises: what draw_student gave."""
    write_json(os.path.join(folder, "lines.json"), programs)
    for i, noise in enumerate(noises):
        tensors = {str(k): eps.contiguous() for k, eps in enumerate(noise)}
        save_file(tensors, os.path.join(folder, f"{i}.noise"))
    command = [sys.executable, "-c", READER]
    result = subprocess.run(command, cwd=folder, capture_output=True, text=True, timeout=600)
    assert result.returncode == 0, result.stderr
    return [np.load(os.path.join(folder, f"{i}.npy")) for i in range(len(programs))]


# ----------------------------------------------------------------------------------------------------------
# Commands
# ----------------------------------------------------------------------------------------------------------


def collect(*arguments):
    """collect_ode.py in this process."""
    collect_ode.main(arguments)


def run_script(script, *words, processes=None, folder=ROOT, timeout=900):
    """A script (its path from the repository's root) as a command, with torchrun if `processes` is given ->
    its result, output captured as text. folder: the working directory."""
    torchrun = []
    if processes:
        torchrun = ["-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={processes}"]
    command = [sys.executable, *torchrun, os.path.join(ROOT, script), *words]
    return subprocess.run(command, cwd=folder, capture_output=True, text=True, timeout=timeout)


# ----------------------------------------------------------------------------------------------------------
# What runs leave behind
# ----------------------------------------------------------------------------------------------------------


def read_metrics(folder):
    """The lines of a run's metrics.jsonl without what differs from machine to machine."""
    with open(os.path.join(folder, "metrics.jsonl")) as file:
        lines = [json.loads(line) for line in file]
    for line in lines:
        for name in ("seconds", "peak_mb", "held_out_seconds"):
            line.pop(name, None)
    return lines


def read_state(folder):
    """A checkpoint's state/, {name: value}."""
    folder = os.path.join(folder, "state")
    state = {}
    for name in os.listdir(folder):
        state[name.removesuffix(".pt")] = torch.load(os.path.join(folder, name), weights_only=True)
    return state


def read_adam(state):
    """An optimiser's state_dict -> (its averages of the gradients [N], about the largest step that it took
    last)."""
    parts = state["state"].values()
    group = state["param_groups"][0]
    mean = torch.cat([part["exp_avg"].flatten() for part in parts])
    square = torch.cat([part["exp_avg_sq"].flatten() for part in parts])
    step = group["lr"] * mean / (square.sqrt() + group["eps"])
    return mean, step.abs().max().item()


def take_snapshot(folder):
    """{path: digest} of all files below, folders included."""
    found = {}
    for place, folders, files in os.walk(folder):
        for name in folders:
            found[os.path.join(place, name)] = None
        for name in files:
            path = os.path.join(place, name)
            with open(path, "rb") as file:
                found[path] = hashlib.sha256(file.read()).hexdigest()
    return found


# ----------------------------------------------------------------------------------------------------------
# Runs that are compared
# ----------------------------------------------------------------------------------------------------------


def write_curves(metrics, path):
    """In the place of save_curves: a file that is no picture."""
    with write_atomically(path) as temporary, open(temporary, "w") as file:
        file.write("curves\n")


class SteadyAdamW(torch.optim.AdamW):
    """AdamW with a larger epsilon: with its own the first steps follow a gradient's sign, and entries that
    are zero but for rounding move by the whole learning rate."""

    def __init__(self, parameters, **options):
        super().__init__(parameters, eps=1e-3, **options)


def make_runs_comparable(patch=setattr):
    """Runs differ by no more than rounding; they draw nothing, which would take half their time.

    patch: setattr, or a test's monkeypatch.setattr."""
    patch(torch.optim, "AdamW", SteadyAdamW)
    patch(run, "save_preview", lambda *_: None)
    patch(run, "save_curves", lambda *_: None)
