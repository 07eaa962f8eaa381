"""Measures students beside their teacher, and beside the paper's numbers: one set of prompts and seeds, a row a system.

    python evaluate.py --teacher assets/tiny-sdxl --student adp=runs/adp --student dmdx=runs/adm --prompts prompts/shapes_eval.txt
    torchrun --nproc_per_node=8 evaluate.py --teacher sdxl --student dmdx=runs/adm-sdxl --prompts coco.txt --seeds 1 \\
        --metrics clip,pick,hpsv2,mps,fid --out runs/coco
    python evaluate.py --images mine=pictures --images theirs=others --prompts coco.txt --metrics clip --out runs/two --side-by-side mine theirs
    python evaluate.py --student runs/adm-cogvideox --prompts VBench_full_info.json --seeds 5 --metrics vbench --out runs/vbench

Metrics: `oracle` (tiny teachers only: exact numbers), `clip`, `pick` (PickScore), `hpsv2`, `mps`, `lpips` (diversity), `fid`
(to --reference) and `vbench` (videos). Prints a Markdown table with 95 % confidence intervals, and with the paper's rows where a metric is
the paper's. Writes

    OUT/NAME/pictures/0000-0.png ...   prompt number, seed; of a video its frames below one another
    OUT/NAME/scores.jsonl              every picture's scores
    OUT/report.json, table.md, grid.png, bars.png, differences.png (per prompt, to the reference), best-and-worst-NAME.png, side-by-side.html

A picture depends on its prompt's number and its seed alone, and scores on the pictures: any number of processes writes the same files. A
repeated command goes on where the last one ended; one with more metrics computes those.
"""
import base64
import hashlib
import html
import io
import json
import os
import re
import shutil
import subprocess
import tempfile
import textwrap
import time
import warnings

import numpy as np
import torch
import torch.nn.functional as F
from safetensors.numpy import load_file, save_file
from tqdm import tqdm

import common
from common import UserError
from sample import System, add_system_arguments, load_teacher

os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")  # they warn of the workers' forks otherwise

# ---------------------------------------------------------------------------------------------------------------------------
# Scorers: each judges the pictures of a prompt
# ---------------------------------------------------------------------------------------------------------------------------

# Every scorer has
#     takes    what it is for: "pictures", "videos"
#     what     model, weights and settings: what has to stand beside a number
#     prepare(image) -> tensor, of one PIL image; of a video's frames below one another. Runs in DataLoader workers
#     score(prepared [P, K, ...], P prompts) -> {name: array [P K, ...]}, K samples of each prompt; a number of a whole prompt is repeated
#     result(scores, reference) -> {name: number or {name: number}}, from a list of what score() gave, and that of the reference system
#
# Weights come from --weights-dir, laid out as DIR/OWNER/REPOSITORY/FILE, or from the caches of the hub and torch, or from the network. All
# are read as tensors; nothing is unpickled.


def repository(args, repo, *files):
    """The folder with these files of a hub repository. UserError that says which one is missing and where it was looked for."""
    import huggingface_hub

    folder = os.path.join(args.weights_dir or "", repo)
    there = [file for file in files if args.weights_dir and os.path.exists(os.path.join(folder, file))]
    if len(there) == len(files):
        return folder
    for file in sorted(files, key=there.__contains__):  # the missing ones first
        try:
            found = os.path.dirname(huggingface_hub.hf_hub_download(repo, file))
        except (OSError, ValueError) as error:
            looked = ([os.path.join(folder, file)] if args.weights_dir else []) + [f"the cache {huggingface_hub.constants.HF_HUB_CACHE}"]
            raise UserError(f"the file {file} of {repo} is wanted; it is not in {' nor in '.join(looked)} and could not be fetched "
                            f"({type(error).__name__}): put it into DIR/{repo}/ and give --weights-dir DIR") from error
    return found


def tensors(path):
    """A checkpoint's state_dict. UserError for a file that is more than tensors, or less."""
    try:
        state = common.read_tensors(path)
        return state.get("state_dict", state)
    except Exception as error:  # torch.load and safetensors raise many kinds for a damaged file
        raise UserError(f"{path} cannot be read as a file of tensors: {common.first_line(error)}") from error


def fill(module, state, path):
    """Loads a state_dict that has every parameter of the module and may have more. UserError where one is missing or of another shape."""
    try:
        missing = set(module.load_state_dict(state, strict=False).missing_keys) & {name for name, _ in module.named_parameters()}
    except RuntimeError as error:
        raise UserError(f"{path} has weights of another model: {str(error).splitlines()[-1].strip()}") from error
    if missing:
        raise UserError(f"{path} has not all the weights that are wanted: {sorted(missing)[0]} is missing")
    return module.eval().requires_grad_(False)


def pixels_of(image):
    """PIL image -> [3, H, W] in [-1, 1]."""
    return torch.from_numpy(np.array(image.convert("RGB"))).permute(2, 0, 1) / 127.5 - 1


class Scorer:
    """One whose result is the mean of what it gives each picture."""

    takes, what = ("pictures",), ""

    def result(self, scores, reference):
        return {name: np.concatenate([part[name] for part in scores]).mean() for name in scores[0]}


class Oracle(Scorer):
    """What the oracle of tiny/shapes.py reads. Exact; only for teachers of that world.

    accuracy: share of samples that are valid and show every attribute that their prompt names; accuracy_of: the same for one attribute,
    over the prompts that name it. valid: share of samples that show one clean shape. tv: total-variation distance of an attribute's
    distribution, over the prompts that leave it open, to the reference's (of the reference itself: to uniform, as tv_uniform always).
    position_std: of the centre's coordinates, pixels. pairwise_distance: root mean square between two samples of one prompt."""

    takes, what = ("pictures", "videos"), "exact, tiny/shapes.py"

    def __init__(self, args, prompts, video):
        from tiny import shapes

        self.parse, self.attributes = shapes.parse, shapes.VIDEO if video else shapes.ATTRIBUTES
        self.oracle, self.video, self.side = shapes.VideoOracle() if video else shapes.Oracle(), video, shapes.SIDE
        try:
            for prompt in prompts:
                self.parse(prompt)
        except ValueError as error:
            raise UserError(f"--metrics oracle: {error}") from error

    def prepare(self, image):
        pixels = pixels_of(image)
        return pixels.unflatten(1, (-1, self.side)) if self.video else pixels

    def score(self, pixels, prompts):
        """Each attribute as read, int; each as wanted, -1 where the prompt leaves it open; accuracy; the mean distance, if K > 1."""
        P, K = pixels.shape[:2]
        try:
            read = self.oracle.read(pixels.flatten(0, 1).numpy())
        except ValueError as error:
            raise UserError(f"--metrics oracle is for the tiny teachers: {error}") from error
        wanted = [self.parse(prompt) for prompt in prompts]
        right = read["valid"].copy()
        for name in self.attributes:
            want = np.repeat([-1 if w.get(name) is None else w[name] for w in wanted], K)
            read[f"wanted {name}"] = want
            right &= (want < 0) | (read[name] == want)
        read["accuracy"] = right.astype(np.float32)
        if K > 1:
            distance = torch.cdist(pixels.flatten(2), pixels.flatten(2)) / pixels[0, 0].numel() ** 0.5
            read["pairwise_distance"] = (distance.sum((1, 2)) / (K * (K - 1))).repeat_interleave(K).numpy()
        return read

    def shares(self, scores):
        """The distribution of each attribute over the samples whose prompt leaves it open, where there are any."""
        shares = {}
        for name, values in self.attributes.items():
            free = np.concatenate([part[name][part[f"wanted {name}"] < 0] for part in scores])
            if len(free):
                shares[name] = np.bincount(free, minlength=len(values)) / len(free)
        return shares

    def result(self, scores, reference):
        read = {name: np.concatenate([part[name] for part in scores]) for name in scores[0]}
        named = {name: read[f"wanted {name}"] >= 0 for name in self.attributes}
        right = {name: read[name] == read[f"wanted {name}"] for name in self.attributes}
        shares, shares_reference = self.shares(scores), self.shares(reference)
        tv_uniform = {name: 0.5 * np.abs(p - 1 / len(p)).sum() for name, p in shares.items()}
        tv = tv_uniform if reference is scores else {name: 0.5 * np.abs(p - shares_reference[name]).sum() for name, p in shares.items()}
        return {"accuracy": read["accuracy"].mean(), "valid": read["valid"].mean(),
                "accuracy_of": {name: right[name][named[name]].mean() for name in named if named[name].any()}, "tv": tv, "tv_uniform": tv_uniform,
                "position_std": np.sqrt((read["x"].var() + read["y"].var()) / 2),
                **({"pairwise_distance": read["pairwise_distance"].mean()} if "pairwise_distance" in read else {})}


class Clip(Scorer):
    """100 x cosine of CLIP's picture and text embeddings (open_clip): any of its models, weights by tag or from a local checkpoint.

    As DMD2 measures: the picture is cut to a square and resized to 256 before CLIP's own preparation, the prompt gets a prefix."""

    name = "clip"

    def __init__(self, args, prompts, video):
        self.prefix, weights = args.clip_prefix, args.clip_weights
        self.load(args, args.clip_model, weights)
        self.what = f"open_clip {args.clip_model}, {weights}, prefix {args.clip_prefix!r}"

    def load(self, args, model, weights):
        """The network with weights of a tag, or of a file of tensors."""
        open_clip = common.needed("open_clip", "open_clip_torch", "computes the CLIP score and HPSv2")
        self.device, tag = common.own_device(), open_clip.get_pretrained_cfg(model, weights)
        if tag.get("hf_hub"):
            file = "open_clip_model.safetensors"
            weights = os.path.join(repository(args, tag["hf_hub"].strip("/"), file), file)
        known = {"image_mean": tag.get("mean"), "image_std": tag.get("std"), "force_quick_gelu": tag.get("quick_gelu", False)}
        try:
            self.model, _, self.preprocess = open_clip.create_model_and_transforms(model, pretrained=weights, device=self.device, **known)
            self.tokenize = open_clip.get_tokenizer(model)
        except Exception as error:  # open_clip and torch raise many kinds for an unknown model, or a file of another one
            raise UserError(f"CLIP {model} with weights {weights} could not be loaded: {common.first_line(error)}") from error
        self.model.eval()

    def prepare(self, image):
        from PIL import Image

        side, image = min(image.size), image.convert("RGB")
        left, top = (image.width - side) // 2, (image.height - side) // 2
        return self.preprocess(image.crop((left, top, left + side, top + side)).resize((256, 256), Image.Resampling.LANCZOS))

    @torch.no_grad()
    def score(self, pictures, prompts):
        picture = self.model.encode_image(pictures.flatten(0, 1).to(self.device), normalize=True)
        text = self.model.encode_text(self.tokenize([self.prefix + prompt for prompt in prompts]).to(self.device), normalize=True)
        return {self.name: 100 * (picture * text.repeat_interleave(pictures.shape[1], 0)).sum(1).cpu().numpy()}


class Hpsv2(Clip):
    """Human Preference Score v2: 100 x cosine of a CLIP ViT-H-14 that was trained on preferences. v2.0 is the paper's order of magnitude;
    numbers of v2.1 are of another scale, so that they have a name of their own."""

    architecture, prefix = "ViT-H-14", ""

    def __init__(self, args, prompts, video):
        file = {"2.0": "HPS_v2_compressed.pt", "2.1": "HPS_v2.1_compressed.pt"}[args.hps_version]
        path = os.path.join(repository(args, "xswu/HPSv2", file), file)
        self.name = "hpsv2" if args.hps_version == "2.0" else "hpsv2.1"
        self.what = f"version {args.hps_version}: open_clip {self.architecture}, xswu/HPSv2 {file}"
        self.load(args, self.architecture, path)

    def prepare(self, image):
        return self.preprocess(image.convert("RGB"))


class Pick(Scorer):
    """PickScore: exp(logit_scale) x cosine of a CLIP that was trained on preferences."""

    BASE = "laion/CLIP-ViT-H-14-laion2B-s32B-b79K"
    what = "yuvalkirstain/PickScore_v1"

    def __init__(self, args, prompts, video):
        from transformers import CLIPModel

        self.load_processor(args)
        folder = repository(args, "yuvalkirstain/PickScore_v1", "config.json", "model.safetensors")
        try:
            self.model = CLIPModel.from_pretrained(folder).to(self.device).eval()
        except (OSError, ValueError, RuntimeError) as error:
            raise UserError(f"PickScore's model in {folder} could not be loaded: {common.first_line(error)}") from error

    def load_processor(self, args):
        """Image processor (Pillow's resizing, as when the scores were published) and tokenizer of the CLIP that PickScore and MPS began from."""
        from transformers import AutoTokenizer, CLIPImageProcessorPil

        self.folder, self.device = repository(args, self.BASE, "config.json", "preprocessor_config.json", "tokenizer.json", "tokenizer_config.json"), common.own_device()
        self.process, self.tokenizer = CLIPImageProcessorPil.from_pretrained(self.folder), AutoTokenizer.from_pretrained(self.folder)

    def prepare(self, image):
        return self.process(images=image.convert("RGB"), return_tensors="pt").pixel_values[0]

    def tokens(self, texts):
        length = self.model.config.text_config.max_position_embeddings
        return self.tokenizer(texts, padding="max_length", truncation=True, max_length=length, return_tensors="pt").input_ids.to(self.device)

    @torch.no_grad()
    def score(self, pictures, prompts):
        picture = F.normalize(self.model.get_image_features(pixel_values=pictures.flatten(0, 1).to(self.device)).pooler_output, dim=1)
        text = F.normalize(self.model.get_text_features(input_ids=self.tokens(prompts)).pooler_output, dim=1)
        return {"pick": (self.model.logit_scale.exp() * (picture * text.repeat_interleave(pictures.shape[1], 0)).sum(1)).cpu().numpy()}


class Mps(Pick):
    """Multi-dimensional Preference Score, of Kwai-Kolors/MPS, "overall": a CLIP whose picture tokens look at those words of the prompt that
    matter to a condition, through a small cross-attention model. exp(logit_scale) x cosine of the first picture token and the prompt.

    The published checkpoint is a pickled module, which is never opened here; MPS_overall.safetensors has its tensors (see README)."""

    CONDITION = ("light, color, clarity, tone, style, ambiance, artistry, shape, face, hair, hands, limbs, structure, instance, texture, quantity, "
                 "attributes, position, number, location, word, things.")
    FILE = "MPS_overall.safetensors"
    THRESHOLD = 0.3  # of its evaluation script; its training forward has 0.01
    what = "overall, threshold 0.3"

    def __init__(self, args, prompts, video):
        from transformers import CLIPConfig, CLIPModel

        path = os.path.join(args.weights_dir or "", self.FILE)
        if not os.path.exists(path):
            raise UserError(f"the file {self.FILE} is wanted, and it is not {f'at {path}' if args.weights_dir else 'there without --weights-dir'}: "
                            "make it from MPS_overall_checkpoint.pth as README says, and give --weights-dir with its folder")
        self.load_processor(args)
        state = tensors(path)
        model = CLIPModel(CLIPConfig.from_pretrained(self.folder))
        self.model = fill(model, {name.removeprefix("model."): w for name, w in state.items()}, path).to(self.device)
        self.cross = {name.removeprefix("cross_model.layers."): w.float().to(self.device) for name, w in state.items() if name.startswith("cross_model.layers.")}
        if "0.0.fn.to_q.weight" not in self.cross:
            raise UserError(f"{path} has no cross-attention model (cross_model.layers.0.0.fn.to_q.weight); make it as README says")

    @torch.no_grad()
    def score(self, pictures, prompts):
        image = self.model.visual_projection(self.model.vision_model(pictures.flatten(0, 1).to(self.device)).last_hidden_state)  # [P K, 257, D]
        text, end = self.text(prompts)  # [P, 77, D], [P, D]
        condition, _ = self.text([self.CONDITION])
        similarity = torch.einsum("pid,jd->pij", text, condition[0]).amax(2)  # [P, 77]
        kept = similarity / similarity.amax(1, keepdim=True) > self.THRESHOLD
        text, end, kept = (x.repeat_interleave(pictures.shape[1], 0) for x in (text, end, kept))
        fused = F.normalize(self.fuse(image, text, kept)[:, 0], dim=1)
        return {"mps": (self.model.logit_scale.exp() * (fused * F.normalize(end, dim=1)).sum(1)).cpu().numpy()}

    def text(self, prompts):
        """Projected features of all tokens [P, 77, D], and of the end-of-text token [P, D]."""
        out = self.model.text_model(self.tokens(prompts))
        return self.model.text_projection(out.last_hidden_state), self.model.text_projection(out.pooler_output)

    def fuse(self, x, text, kept):
        """The cross-attention model: picture tokens x [B, N, D], prompt tokens [B, M, D] of which `kept` [B, M] are seen -> [B, N, D]."""
        for layer in range(1 + max(int(name.split(".")[0]) for name in self.cross)):
            w = {name.removeprefix(f"{layer}."): weight for name, weight in self.cross.items() if name.startswith(f"{layer}.")}
            cross = {name.removeprefix("0.fn."): weight for name, weight in w.items() if name.startswith("0.")}
            own = {name.removeprefix("1.fn."): weight for name, weight in w.items() if name.startswith("1.")}
            h = F.layer_norm(x, x.shape[-1:], cross["norm.weight"])
            key, value = F.linear(text, cross["to_kv.weight"]).chunk(2, dim=-1)
            seen = attend(F.linear(h, cross["to_q.weight"]), key, value, kept[:, None, None])
            x = x + F.linear(seen, cross["to_out.weight"]) + F.linear(swiglu(F.linear(h, cross["ff.0.weight"])), cross["ff.2.weight"])

            h = F.layer_norm(x, x.shape[-1:], own["norm.weight"])
            inner = own["attn_out.weight"].shape[1]  # heads x 64
            query, key, value, wide = F.linear(h, own["fused_attn_ff_proj.weight"]).split((inner, 64, 64, 2 * own["ff_out.1.weight"].shape[1]), dim=-1)
            seen = attend(rotated(query), rotated(key), value)
            x = x + F.linear(seen, own["attn_out.weight"]) + F.linear(swiglu(wide), own["ff_out.1.weight"])
        return x


def attend(query, key, value, mask=None):
    """Heads of 64 with one key and one value head: query [B, N, heads x 64], key and value [B, M, 64] -> [B, N, heads x 64]."""
    query = query.unflatten(2, (-1, 64)).transpose(1, 2)
    key, value = (x[:, None].expand(-1, query.shape[1], -1, -1) for x in (key, value))
    return F.scaled_dot_product_attention(query, key, value, mask).transpose(1, 2).flatten(2)


def rotated(x):
    """Rotary positions, base 10000, in every 64 channels of x [B, N, n x 64]: channel i turns with channel i + 32."""
    angle = torch.arange(x.shape[1], device=x.device)[:, None] / 10000 ** (torch.arange(0, 64, 2, device=x.device) / 64)
    cos, sin = angle.cos()[:, None], angle.sin()[:, None]
    first, second = x.unflatten(2, (-1, 64)).chunk(2, dim=-1)
    return torch.cat([first * cos - second * sin, second * cos + first * sin], dim=-1).flatten(2)


def swiglu(x):
    value, gate = x.chunk(2, dim=-1)
    return value * F.silu(gate)


class Lpips(Scorer):
    """Diversity: mean LPIPS distance over all pairs of the pictures of a prompt, resized with Lanczos, in [-1, 1] as lpips expects them.

    LPIPS is a weighted square distance of normalised maps, and the mean square distance over all pairs is twice the variance: one pass a
    picture. The net `random` is AlexNet with random weights and equal weights for its channels: it needs no file, and its numbers, under a
    name of their own, compare with each other only."""

    URL = {"alex": "https://download.pytorch.org/models/alexnet-owt-7be5be79.pth", "vgg": "https://download.pytorch.org/models/vgg16-397923af.pth"}

    def __init__(self, args, prompts, video):
        lpips = common.needed("lpips", "lpips", "computes the LPIPS diversity")
        self.device, self.size, self.normalize = common.own_device(), args.lpips_size, lpips.normalize_tensor
        self.name, self.what = "lpips", f"{args.lpips_net}, {args.lpips_size} pixels, in [-1, 1]"
        random = args.lpips_net == "random"
        if random:
            self.name, self.what = "lpips_random", f"AlexNet with RANDOM weights, {args.lpips_size} pixels: not LPIPS, compares within this table only"
        with torch.random.fork_rng(devices=[]), warnings.catch_warnings():
            warnings.simplefilter("ignore")  # lpips calls torchvision in a way that it deprecates
            torch.manual_seed(0)
            self.model = lpips.LPIPS(net="alex" if random else args.lpips_net, pnet_rand=True, lpips=not random, verbose=False)
        if not random:
            path = common.fetched(self.URL[args.lpips_net], "give --weights-dir DIR with it", args.weights_dir)
            # lpips calls layer i of torchvision's network sliceN.i
            names = {re.sub(r"slice\d+", "features", name): name for name, _ in self.model.net.named_parameters()}
            fill(self.model.net, {names.get(name, name): w for name, w in tensors(path).items()}, path)
        self.model.to(self.device).eval()

    def prepare(self, image):
        from PIL import Image

        return pixels_of(image.convert("RGB").resize((self.size, self.size), Image.Resampling.LANCZOS))

    @torch.no_grad()
    def score(self, pictures, prompts):
        return {self.name: np.repeat([self.diversity(samples.to(self.device)) for samples in pictures], pictures.shape[1])}

    def diversity(self, samples):
        """The mean over all pairs of samples [K, 3, H, W]."""
        maps = self.model.net(self.model.scaling_layer(samples))
        spread = [2 * self.normalize(m).var(0, keepdim=True) for m in maps]  # [1, C, h, w] each
        return sum((self.model.lins[i](s) if self.model.lpips else s.sum(1)).mean().item() for i, s in enumerate(spread))


class Fid(Scorer):
    """Fréchet distance to the reference's pictures, in features of the Inception of 2015 (torchmetrics), resized with Pillow's bicubic."""

    URL = "https://github.com/toshas/torch-fidelity/releases/download/v0.2.0/weights-inception-2015-12-05-6726825d.pth"
    what = "Inception of 2015"

    def __init__(self, args, prompts, video):
        common.needed("torchmetrics", "torchmetrics[image]", "computes FID")
        common.needed("torch_fidelity", "torchmetrics[image]", "has FID's Inception")
        from torchmetrics.image.fid import NoTrainInceptionV3

        path, self.device = common.fetched(self.URL, "give --weights-dir DIR with it", args.weights_dir), common.own_device()
        tensors(path)  # the library unpickles it: only after it has been read as tensors alone
        try:
            self.model = NoTrainInceptionV3("inception-v3-compat", ["2048"], path).to(self.device)
        except RuntimeError as error:
            raise UserError(f"{path} has weights of another model: {str(error).splitlines()[-1].strip()}") from error

    def prepare(self, image):
        from PIL import Image

        return torch.from_numpy(np.array(image.convert("RGB").resize((299, 299), Image.Resampling.BICUBIC))).permute(2, 0, 1)

    @torch.no_grad()
    def score(self, pictures, prompts):
        return {"features": self.model(pictures.flatten(0, 1).to(self.device)).cpu().numpy()}

    def result(self, scores, reference):
        from torchmetrics.image.fid import FrechetInceptionDistance

        same = torch.nn.Identity()  # what torchmetrics gets are features already
        same.num_features = scores[0]["features"].shape[1]
        distance = FrechetInceptionDistance(same)
        for part in scores:
            distance.update(torch.from_numpy(part["features"]), real=False)
        for part in reference:
            distance.update(torch.from_numpy(part["features"]), real=True)
        return {"fid": distance.compute().item()}


def read_vbench(path):
    """VBench_full_info.json, VBench's own prompt list -> (prompts, [the dimensions of each])."""
    entries = common.read_json(path)
    if not isinstance(entries, list) or not all(isinstance(entry, dict) and {"prompt_en", "dimension"} <= set(entry) for entry in entries):
        raise UserError(f"{path} is not VBench's prompt list: VBench_full_info.json has entries with prompt_en and dimension")
    return [entry["prompt_en"] for entry in entries], [entry["dimension"] for entry in entries]


def vbench(folder, videos, prompts, dimensions):
    """Lays out videos [P][K] (paths of mp4 files) as VBench wants them, FOLDER/DIMENSION/PROMPT-INDEX.mp4, and runs it where it is installed
    -> {dimension: score}; where it is not, {} and the commands are printed."""
    results = {}
    for dimension in sorted({name for names in dimensions for name in names}):
        place, output = os.path.join(folder, dimension), os.path.join(folder, "results", dimension)
        os.makedirs(place, exist_ok=True)
        for paths, prompt, names in zip(videos, prompts, dimensions):
            for index, path in enumerate(paths if dimension in names else []):
                link = os.path.join(place, f"{prompt}-{index}.mp4")
                if not os.path.exists(link):
                    os.link(path, link)
        command = ["vbench", "evaluate", "--videos_path", place, "--dimension", dimension, "--output_path", output]
        if not shutil.which("vbench"):
            print(" ".join(command))
            continue
        os.makedirs(output, exist_ok=True)
        try:
            subprocess.run(command, check=True)
            newest = max((os.path.join(output, name) for name in os.listdir(output) if name.endswith("eval_results.json")), key=os.path.getmtime)
            results[dimension] = json.load(open(newest))[dimension][0]  # the mean, then a list of the videos'
        except (subprocess.CalledProcessError, ValueError, KeyError) as error:
            raise UserError(f"vbench gave no result: {' '.join(command)}: {common.first_line(error)}") from error
    return results


# ---------------------------------------------------------------------------------------------------------------------------
# Pictures, tables, plots
# ---------------------------------------------------------------------------------------------------------------------------

SCORERS = {"oracle": Oracle, "clip": Clip, "pick": Pick, "hpsv2": Hpsv2, "mps": Mps, "lpips": Lpips, "fid": Fid}
SCORED = 64  # pictures at a time: a constant, so that scores do not depend on how many processes there are
SHOWN = 200  # prompts in the HTML page, which holds its pictures

# paper: system, where, steps, passes, scores in the order of COLUMNS. Table 6, LPIPS, is of the systems of table 1.
COLUMNS = ("clip", "pick", "hpsv2", "mps", "lpips")
PAPER = [
    ("ADD, 512 px", "tables 1 and 6", 1, 1, (35.0088, 22.1524, 27.0971, 10.4340, 0.6071)),
    ("LCM", "tables 1 and 6", 1, 2, (28.4669, 20.1267, 23.8246, 4.8134, 0.6257)),
    ("Lightning", "tables 1 and 6", 1, 1, (33.4985, 21.9194, 27.1557, 10.2285, 0.6707)),
    ("DMD2", "tables 1 and 6", 1, 1, (35.2153, 22.0978, 27.4523, 10.6947, 0.6715)),
    ("DMDX", "tables 1 and 6", 1, 1, (35.2557, 22.2736, 27.7046, 11.1978, 0.7156)),
    ("SDXL-Base", "tables 1 and 6", 25, 50, (35.0309, 22.2494, 27.3743, 10.7042, 0.6936)),
    ("SD3-Medium TSCD", "table 2", 4, 8, (34.0185, 21.9665, 27.2728, 10.8600)),
    ("SD3-Medium PCM, shift 1", "table 2", 4, 4, (33.5042, 21.9703, 27.3680, 10.5707)),
    ("SD3-Medium Flash", "table 2", 4, 4, (34.3978, 22.0904, 27.2586, 10.6634)),
    ("SD3-Medium ADM", "table 2", 4, 4, (34.9076, 22.5471, 28.4492, 11.9543)),
    ("SD3-Medium", "table 2", 25, 50, (34.7633, 22.2961, 27.9733, 11.3652)),
    ("SD3.5-Large LADD", "table 2", 4, 4, (34.7395, 22.3958, 27.4923, 11.4372)),
    ("SD3.5-Large ADM", "table 2", 4, 4, (34.9730, 22.8842, 27.7331, 12.2350)),
    ("SD3.5-Large", "table 2", 25, 50, (34.9668, 22.5087, 27.9688, 11.5826)),
]


class Pictures:
    """A system's pictures, drawn or found: files[p][k] is sample k of prompt p. `frames` is 1, or a video's, which are below one another."""

    def __init__(self, name, folder, files, index, system=None):
        self.name, self.folder, self.files, self.index, self.system = name, folder, files, index, system
        self.frames, self.fps = (system.teacher.frames or 1, system.teacher.fps) if system else (1, None)

    def check(self):
        """UserError where the folder has another system's pictures, or the same with other settings."""
        index = common.read_json(os.path.join(self.folder, "index.json"))
        if index and index != self.index:
            raise UserError(f"{self.folder} holds results of other pictures, prompts or settings; give another --out, or delete it")

    def draw(self, prompts, seeds, batch):
        """Draws what is not there yet of this process's share -> mean seconds a picture, None where nothing was left to draw."""
        parts = [(first, k) for first in range(0, len(prompts), batch) for k in range(len(seeds))][common.rank() :: common.world_size()]
        parts = [(first, k) for first, k in parts if not all(os.path.exists(row[k]) for row in self.files[first : first + batch])]
        seconds = []
        for first, k in tqdm(parts, desc=self.name, unit="batch", disable=not common.is_main()):
            numbers = range(first, min(first + batch, len(prompts)))
            start = time.perf_counter()
            pixels = self.system.pictures([prompts[i] for i in numbers], numbers, [seeds[k]])[:, 0]
            seconds.append((time.perf_counter() - start) / len(numbers))
            for i, one in zip(numbers, pixels):
                common.save_grid(one.flatten(1, -2)[None], self.files[i][k], padding=0)
        return np.mean(seconds) if seconds else None

    def score(self, name, scorer, prompts, workers):
        """Scores what has no scores yet of this process's share -> the paths of all processes' files of scores, in order."""
        chunk = max(1, SCORED // len(self.files[0]))
        digest = hashlib.sha256(json.dumps([scorer.what, chunk]).encode()).hexdigest()[:8]
        folder = os.path.join(self.folder, "scores", f"{name}-{digest}")
        common.make_folder(folder)
        parts = [(first, os.path.join(folder, f"{first:06d}.safetensors")) for first in range(0, len(prompts), chunk)]
        mine = [part for part in parts[common.rank() :: common.world_size()] if not os.path.exists(part[1])]
        dataset = Prepared([self.files[first : first + chunk] for first, _ in mine], scorer.prepare)
        workers = min(workers, len(mine))
        loader = torch.utils.data.DataLoader(dataset, batch_size=None, num_workers=workers, multiprocessing_context="fork" if workers else None)
        try:
            for (first, path), pictures in zip(tqdm(mine, desc=f"{self.name}, {name}", unit="batch", disable=not common.is_main()), loader):
                columns = scorer.score(pictures, prompts[first : first + chunk])
                with common.replacing(path) as temporary:
                    save_file(columns, temporary)
        except OSError as error:
            raise UserError(f"a picture of {self.name} cannot be read: {str(error).splitlines()[-1]}") from error
        return [path for _, path in parts]

    def picture(self, p, k=0):
        """Sample k of prompt p as PIL images: one, or a video's frames."""
        from PIL import Image

        with Image.open(self.files[p][k]) as image:
            image = image.convert("RGB")
        height = image.height // self.frames
        return [image.crop((0, i * height, image.width, (i + 1) * height)) for i in range(self.frames)]

    def pixels(self, p, k=0, size=None):
        """The same as [3, (F,) H, W] in [-1, 1], resized to `size` (width, height)."""
        frames = np.stack([np.array(frame.resize(size or frame.size)) for frame in self.picture(p, k)])
        pixels = torch.from_numpy(frames).permute(3, 0, 1, 2) / 127.5 - 1
        return pixels if self.frames > 1 else pixels[:, 0]

    def videos(self):
        """Every sample as an mp4 file beside its picture -> paths [P][K]."""
        paths = [[re.sub("png$", "mp4", file) for file in row] for row in self.files]
        for p, row in enumerate(paths):
            for k, path in enumerate(row):
                if not os.path.exists(path):
                    common.save_video(self.pixels(p, k), path, self.fps)
        return paths


class Prepared(torch.utils.data.Dataset):
    """Files [P][K] of each chunk -> what a scorer wants, [P, K, ...]; in DataLoader's workers, so that decoding overlaps with scoring."""

    def __init__(self, chunks, prepare):
        self.chunks, self.prepare = chunks, prepare

    def __len__(self):
        return len(self.chunks)

    def __getitem__(self, i):
        return torch.stack([torch.stack([self.open(path) for path in row]) for row in self.chunks[i]])

    def open(self, path):
        from PIL import Image

        try:
            with Image.open(path) as image:
                return self.prepare(image)
        except OSError as error:
            raise OSError(f"{path}: {error}") from error


def drawn(name, out, system, prompts, seeds, meta):
    """The pictures that a system is to draw."""
    folder = os.path.join(out, name)
    files = [[os.path.join(folder, "pictures", f"{p:04d}-{seed}.png") for seed in seeds] for p in range(len(prompts))]
    index = {"prompts": prompts, "seeds": list(seeds), "teacher": system.teacher.fingerprint, "resolution": system.teacher.resolution,
             "frames": system.teacher.frames, "steps": system.steps, **meta}
    return Pictures(name, folder, files, index, system)


def found(name, out, source, count=None):
    """The pictures in a folder, in the order of the numbers in their names: as many for each of `count` prompts; one each by default.
    UserError where there are none, or the number of prompts does not divide theirs."""
    if not os.path.isdir(source):
        raise UserError(f"there is no folder of pictures {source!r}")
    names = [file for file in os.listdir(source) if file.lower().endswith((".png", ".jpg", ".jpeg", ".webp")) and file != "grid.png"]  # sample.py's
    names.sort(key=lambda file: ([int(number) for number in re.findall(r"\d+", file)], file))
    count = count or len(names)
    if not names or len(names) % count:
        raise UserError(f"the folder {source} has {len(names)} pictures, which is no multiple of the {count} prompts")
    paths, K = [os.path.join(source, file) for file in names], len(names) // count
    index = {"files": [[file, os.path.getsize(path), os.path.getmtime(path)] for file, path in zip(names, paths)]}
    return Pictures(name, os.path.join(out, name), [paths[i : i + K] for i in range(0, len(paths), K)], index)


def wait_for(paths):
    """Returns when other processes, too, have written their files. They share nothing else: no group, no timeout; torchrun ends all of them
    when one fails."""
    for path in paths:
        while not os.path.exists(path):
            time.sleep(0.2)


def interval(values):
    """The 95 % bootstrap confidence interval of a mean, from 1000 resamplings: values [P], one a prompt -> (low, high)."""
    rng = np.random.default_rng(0)
    means = [values[rng.integers(len(values), size=len(values))].mean() for _ in range(1000)]
    return tuple(np.quantile(means, (0.025, 0.975)).tolist())


def plain(value):
    """Numbers of numpy and torch -> Python's own, rounded to what means something."""
    if isinstance(value, dict):
        return {name: plain(v) for name, v in value.items()}
    if isinstance(value, tuple):
        return [plain(v) for v in value]
    return value if value is None or isinstance(value, (str, int)) else round(float(value), 5)


def paper_rows(names):
    """The paper's rows that have any of these metrics, marked as the paper's."""
    rows = [{"system": f"{name} (paper, {tables})", "steps": steps, "nfe": nfe, **{n: v for n, v in zip(COLUMNS, scores) if n in names}}
            for name, tables, steps, nfe, scores in PAPER]
    return [row for row in rows if len(row) > 3]


def markdown(lines):
    """Lists of cells, the heads first -> a Markdown table."""
    return "\n".join("| " + " | ".join(line) + " |" for line in [lines[0], ["---"] * len(lines[0]), *lines[1:]])


def table(rows, paper=()):
    """Rows -> a Markdown table, half of the confidence interval's width after ±; a dictionary's values are joined by slashes. VBench has a
    table of its own, with a row a dimension."""
    hidden = ("prompts", "samples", "tv_uniform", "accuracy_of", "ci", "vbench", "seconds_per_image")
    columns = [name for name in rows[0] if name not in hidden]

    def cell(row, name):
        value = row.get(name)
        if isinstance(value, dict):
            return "/".join(f"{x:.2f}" for x in value.values())
        if name in row.get("ci", {}):
            low, high = row["ci"][name]
            return f"{value:.3f} ± {(high - low) / 2:.3f}"
        return "" if value is None else f"{value:.3f}" if isinstance(value, float) else str(value)

    heads = [f"{name} {'/'.join(rows[0][name])}" if isinstance(rows[0][name], dict) else name for name in columns]
    text = markdown([heads, *([cell(row, name) for name in columns] for row in (*rows, *paper))])
    scores = [row.get("vbench") for row in rows]
    if any(scores):
        lines = [[name, *(f"{row[name]:.4f}" if row and name in row else "" for row in scores)] for name in next(filter(None, scores))]
        text += "\n\n" + markdown([["VBench", *(row["system"] for row in rows)], *lines])
    return text


def save_bars(rows, paper, path):
    """A panel a metric: the systems with their confidence intervals, and the paper's rows, grey."""
    import matplotlib.figure

    names = [name for name in rows[0] if isinstance(rows[0][name], float) and name != "seconds_per_image"]
    lines = -(-len(names) // 3)
    figure = matplotlib.figure.Figure(figsize=(18, lines * (1 + 0.3 * (len(rows) + len(paper)))), layout="constrained")
    for i, name in enumerate(names):
        shown = [row for row in (*rows, *paper) if row.get(name) is not None]
        ends = np.array([[abs(row[name] - end) for end in row["ci"][name]] if name in row.get("ci", {}) else [0, 0] for row in shown]).T
        axes = figure.add_subplot(lines, 3, i + 1, title=name)
        axes.barh([row["system"] for row in shown], [row[name] for row in shown], xerr=ends, color=["C0" if "ci" in row else "lightgrey" for row in shown])
        axes.invert_yaxis()
        low, high = (np.array([row[name] for row in shown]) - ends[0]).min(), (np.array([row[name] for row in shown]) + ends[1]).max()
        if low > 0.5 * high:  # differences are small beside the numbers
            axes.set_xlim(1.2 * low - 0.2 * high - 0.01 * high, high + 0.01 * high)
            axes.set_xlabel("the axis does not begin at 0")
    common.save_figure(figure, path)


def save_differences(values, reference, path):
    """values {system: {metric: [P]}} -> a panel for every other system and metric: the histogram over prompts of what it differs by."""
    import matplotlib.figure

    panels = [(system, name) for system in values if system != reference for name in values[system] if name in values[reference]]
    figure = matplotlib.figure.Figure(figsize=(16, 3 * -(-len(panels) // 4)), layout="constrained")
    for i, (system, name) in enumerate(panels):
        difference = values[system][name] - values[reference][name]
        axes = figure.add_subplot(-(-len(panels) // 4), 4, i + 1, title=f"{name}: {system} - {reference}, higher in {(difference > 0).mean():.0%}")
        axes.hist(difference, bins=30)
        axes.axvline(0, color="black", linewidth=1)
        axes.axvline(difference.mean(), color="C1")
    if panels:
        common.save_figure(figure, path)


def save_sheet(pictures, name, values, prompts, path):
    """The eight best prompts by this score, values [P], and below them the eight worst."""
    import matplotlib.figure

    order = np.argsort(-values, kind="stable")
    n = min(8, -(-len(order) // 2))
    figure = matplotlib.figure.Figure(figsize=(2 * n, 6), layout="constrained")
    for i, p in enumerate([*order[:n], *order[::-1][:n]]):
        axes = figure.add_subplot(2, n, i + 1)
        axes.imshow(pictures.picture(p)[0])
        axes.set_title(f"{name} {values[p]:.3f}\n" + textwrap.fill(textwrap.shorten(prompts[p], 90), 26).replace("$", r"\$"), fontsize=7)
        axes.axis("off")
    common.save_figure(figure, path)


PAGE = """<!doctype html><meta charset="utf-8"><title>TITLE</title>
<style>body{font:16px sans-serif;margin:2em;text-align:center}figure{display:inline-block;width:45%;margin:1%}img{width:100%;image-rendering:pixelated}
td,th{padding:0 1em}table{margin:auto}</style>
<p><button id="back">&larr;</button> <span id="place"></span> <button id="on">&rarr;</button> (or the arrow keys)</p><h2 id="prompt"></h2>
<figure><img id="a"><figcaption id="name-a"></figcaption></figure><figure><img id="b"><figcaption id="name-b"></figcaption></figure>
<table id="scores"></table>
<script>
const pages = PAGES, names = NAMES, at = id => document.getElementById(id);
let i = 0;
function row(cells, kind) {
  const line = at("scores").insertRow();
  for (const text of cells) line.appendChild(document.createElement(kind)).textContent = text;
}
function show() {
  i = Math.min(Math.max(0, parseInt(location.hash.slice(1)) || 0), pages.length - 1);
  const page = pages[i];
  at("place").textContent = `${i + 1} of ${pages.length}`;
  at("prompt").textContent = page.prompt;
  at("a").src = page.a; at("b").src = page.b;
  at("name-a").textContent = names[0]; at("name-b").textContent = names[1];
  at("scores").textContent = "";
  row(["", ...names], "th");
  for (const [name, a, b] of page.scores) row([name, a, b], "td");
}
const go = n => { location.hash = Math.min(Math.max(0, i + n), pages.length - 1); };
at("back").onclick = () => go(-1); at("on").onclick = () => go(1);
document.onkeydown = event => { if (event.key == "ArrowLeft") go(-1); if (event.key == "ArrowRight") go(1); };
window.onhashchange = show;
show();
</script>
"""


def save_page(a, b, values, prompts, path):
    """One HTML file that needs no network, to page through the prompts: the first sample of two systems, with scores; at most SHOWN prompts,
    evenly spaced. #N is prompt N of the page. Pictures are shrunk to 512 pixels."""

    def embedded(pictures, p):
        frames = pictures.picture(p)
        for frame in frames:
            frame.thumbnail((512, 512))
        buffer = io.BytesIO()
        frames[0].save(buffer, "WEBP", save_all=True, append_images=frames[1:], duration=1000 // (pictures.fps or 1), loop=0, quality=90)
        return "data:image/webp;base64," + base64.b64encode(buffer.getvalue()).decode()

    pages = []
    for p in np.unique(np.linspace(0, len(prompts) - 1, min(SHOWN, len(prompts))).round().astype(int)):
        scores = [[name, *(f"{values[s.name][name][p]:.3f}" for s in (a, b))] for name in values[a.name] if name in values[b.name]]
        pages.append({"prompt": prompts[p], "a": embedded(a, p), "b": embedded(b, p), "scores": scores})
    script = {"PAGES": json.dumps(pages).replace("<", "\\u003c"), "NAMES": json.dumps([a.name, b.name])}
    page = PAGE.replace("TITLE", html.escape(f"{a.name} and {b.name}"))
    with common.replacing(path) as temporary, open(temporary, "w", encoding="utf-8") as file:
        file.write(re.sub("PAGES|NAMES", lambda match: script[match[0]], page))


def commit():
    """The repository's commit, "unknown" outside git."""
    try:
        return subprocess.run(["git", "rev-parse", "HEAD"], cwd=os.path.dirname(os.path.abspath(__file__)), capture_output=True, text=True, check=True).stdout.strip()
    except (OSError, subprocess.CalledProcessError):
        return "unknown"


def named(entries):
    """NAME=FOLDER, or a folder that gives its own name -> {name: folder}. UserError for a name that cannot be a folder's, or comes twice."""
    pairs = [entry.split("=", 1) if "=" in entry else (common.short_name(entry), entry) for entry in entries]
    for i, (name, _) in enumerate(pairs):
        if not re.fullmatch(r"[\w-][\w.-]*", name):
            raise UserError(f"{name!r} cannot be a system's name: write NAME=FOLDER with a name of letters, digits, dots, - and _")
        if name in ("teacher", *(other for other, _ in pairs[:i])):
            raise UserError(f"there are two systems called {name!r}: write NAME=FOLDER to tell them apart")
    return dict(pairs)


def parse(argv):
    """The command line, with what can be refused before anything is loaded refused."""
    parser = common.Parser(__doc__)
    add_system_arguments(parser)
    parser.add("--student", "NAME=FOLDER, a run folder of adp.py or adm.py; may be given several times", action="append", default=[])
    parser.add("--images", "NAME=FOLDER, pictures that are there, the same number for every prompt, in the prompts' order; may be given several times",
               action="append", default=[])
    parser.add("--prompts", "text file, a prompt a line; or VBench_full_info.json", required=True)
    parser.add("--seeds", "samples of every prompt", type=common.positive, default=8)
    parser.add("--seed", "first of the seeds", type=common.seed, default=0)
    parser.add("--metrics", "comma-separated: " + ", ".join((*SCORERS, "vbench")), default="oracle")
    parser.add("--reference", "the system that others are compared with; for FID also a folder of any pictures (default the first system)")
    parser.add("--weights-dir", "folder with the scorers' weights, for machines without network: DIR/OWNER/REPOSITORY/FILE, DIR/FILE")
    parser.add("--clip-model", "open_clip model", default="ViT-g-14")
    parser.add("--clip-weights", "open_clip tag or a local checkpoint", default="laion2b_s12b_b42k")
    parser.add("--clip-prefix", "put before every prompt", default="A photo depicts ")
    parser.add("--hps-version", "of HPSv2's weights", choices=("2.0", "2.1"), default="2.0")
    parser.add("--lpips-net", "backbone; random needs no file and gives no LPIPS, but numbers to compare within a table",
               choices=("alex", "vgg", "random"), default="alex")
    parser.add("--lpips-size", "pixels, pictures are resized to it", type=common.number(int, "at least 64", lambda value: value >= 64), default=512)  # DMD2
    parser.add("--workers", "processes that decode pictures, for each process that scores", type=common.whole, default=2)
    parser.add("--out", "folder for all results (default a temporary one: only --json and --grid stay)")
    parser.add("--side-by-side", "two systems' names: writes side-by-side.html", nargs=2, metavar=("A", "B"), default=())
    parser.add("--json", "file for the numbers (default OUT/report.json)")
    parser.add("--grid", "file for a picture with a row a system (default OUT/grid.png)")
    parser.add("--since", "Unix time at which the work began that the report is of, for its minutes", type=float, default=time.time())
    args = parser.parse_args(argv)

    args.metrics = args.metrics.split(",")
    unknown = [name for name in args.metrics if name not in (*SCORERS, "vbench")]
    if unknown:
        raise UserError(f"there is no metric {unknown[0]!r}; known are {', '.join((*SCORERS, 'vbench'))}")
    named(args.student + args.images)
    args.student, args.images = named(args.student), named(args.images)
    args.names = [*(["teacher"] if args.teacher else []), *args.student, *args.images]
    if not args.names:
        raise UserError("give a --teacher, a --student, --images, or several of them")
    args.reference = args.reference or args.names[0]
    if args.reference not in args.names and not ("fid" in args.metrics and os.path.isdir(args.reference)):
        raise UserError(f"--reference {args.reference!r} is none of the systems {', '.join(args.names)}; only --metrics fid takes a folder of pictures, too")
    for name in args.side_by_side:
        if name not in args.names:
            raise UserError(f"--side-by-side {name!r} is none of the systems {', '.join(args.names)}")
    if not args.out and (common.world_size() > 1 or args.side_by_side or "vbench" in args.metrics):
        raise UserError("several processes, --side-by-side and --metrics vbench need a folder for the results: give --out")
    if args.weights_dir and not os.path.isdir(args.weights_dir):
        raise UserError(f"there is no folder --weights-dir {args.weights_dir!r}")
    if "vbench" in args.metrics and not args.prompts.endswith(".json"):
        raise UserError("--metrics vbench wants VBench's own prompts: give its VBench_full_info.json as --prompts")
    return args


def main(argv=None):
    args = parse(argv)
    prompts, dimensions = read_vbench(args.prompts) if args.prompts.endswith(".json") else (common.read_prompts(args.prompts), None)
    with tempfile.TemporaryDirectory() as temporary:
        evaluate(args, prompts, dimensions, args.out or temporary)


def evaluate(args, prompts, dimensions, out):
    # What is to be measured, and whether it can be
    systems, seeds, teacher = {}, range(args.seed, args.seed + args.seeds), None
    if args.teacher or args.student:
        with_teacher = bool(args.teacher)
        teacher = load_teacher(args, list(args.student.values()))
        teacher.check(prompts)
        if with_teacher:
            system = System(teacher, None, args.steps, args.guidance)
            systems["teacher"] = drawn("teacher", out, system, prompts, seeds, {"guidance": system.guidance})
        for name, folder in args.student.items():
            checkpoint = os.path.realpath(common.find_checkpoint(folder)[0])
            meta = {"student": checkpoint, "written": os.path.getmtime(os.path.join(checkpoint, "meta.json"))}
            systems[name] = drawn(name, out, System(teacher, folder), prompts, seeds, meta)
    for name, folder in args.images.items():
        systems[name] = found(name, out, folder, len(prompts))
        systems[name].index["prompts"] = prompts
    real = found(f".reference-{common.short_name(args.reference)}", out, args.reference) if args.reference not in systems else None
    for pictures in filter(None, (*systems.values(), real)):
        pictures.check()
        kind = "pictures" if pictures.frames == 1 else "videos"
        for name in args.metrics:
            takes = SCORERS[name].takes if name in SCORERS else ("videos",)
            if kind not in takes:
                raise UserError(f"--metrics {name} is for {' and '.join(takes)}, not for {kind}")
        if "lpips" in args.metrics and pictures is not real and len(pictures.files[0]) < 2:
            raise UserError("--metrics lpips compares pictures of one prompt: give --seeds 2 or more")
    scorers = {name: SCORERS[name](args, prompts, bool(teacher and teacher.video)) for name in args.metrics if name in SCORERS}
    for path in filter(None, (args.json, args.grid)):
        common.make_folder(os.path.dirname(path) or ".")
    for pictures in filter(None, (*systems.values(), real)):
        common.make_folder(os.path.join(pictures.folder, "pictures") if pictures.system else pictures.folder)
        if common.is_main():
            common.write_json(os.path.join(pictures.folder, "index.json"), pictures.index)

    # Draw and score: each process its share
    seconds = {name: pictures.draw(prompts, seeds, args.batch) for name, pictures in systems.items() if pictures.system}
    wait_for(path for pictures in systems.values() for row in pictures.files for path in row)
    files = {(name, metric): pictures.score(metric, scorer, prompts, args.workers) for name, pictures in systems.items() for metric, scorer in scorers.items()}
    if real:
        files[args.reference, "fid"] = real.score("fid", scorers["fid"], [""] * len(real.files), args.workers)
    if not common.is_main():
        return
    wait_for(path for paths in files.values() for path in paths)

    # Report
    rows, values = [], {}
    scores = {key: [load_file(path) for path in paths] for key, paths in files.items()}
    for name, pictures in systems.items():
        P, K = len(pictures.files), len(pictures.files[0])
        row = {"system": name, "steps": None, "nfe": None, "prompts": P, "samples": P * K, "ci": {}}
        if pictures.system:
            row |= {"steps": pictures.system.steps, "nfe": pictures.system.nfe}
        columns, values[name] = {}, {}
        for metric, scorer in scorers.items():
            reference = scores[args.reference if metric == "fid" or args.reference in systems else args.names[0], metric]
            result = scorer.result(scores[name, metric], reference)
            columns |= {column: np.concatenate([part[column] for part in scores[name, metric]]) for column in scores[name, metric][0]}
            for column in [column for column in result if column in columns]:
                values[name][column] = columns[column].reshape(P, K).astype(np.float64).mean(1)
                row["ci"][column] = interval(values[name][column])
            row |= result
        if "vbench" in args.metrics:
            row["vbench"] = vbench(os.path.join(pictures.folder, "vbench"), pictures.videos(), prompts, dimensions)
        rows.append(plain(row | ({"seconds_per_image": seconds[name]} if seconds.get(name) else {})))
        with common.replacing(os.path.join(pictures.folder, "scores.jsonl")) as temporary, open(temporary, "w") as file:
            single = {column: array for column, array in columns.items() if array.ndim == 1}
            for i in range(P * K):
                line = {"prompt": i // K, "text": prompts[i // K], "file": os.path.basename(pictures.files[i // K][i % K])}
                file.write(json.dumps(line | {column: plain(array[i].item()) for column, array in single.items()}) + "\n")

    paper = paper_rows(rows[0])
    first = systems[args.names[0]]
    text = table(rows, paper) + f"\n\n{len(prompts)} prompts, {len(first.files[0])} samples each; ± is half of a 95 % bootstrap interval over the prompts.\n"
    text += "\n".join(f"{name}: {scorer.what}." for name, scorer in scorers.items() if scorer.what)
    print(text)
    if args.json or args.out:
        report = {"rows": rows, "paper": paper, "seed": args.seed, "commit": commit(), "minutes": (time.time() - args.since) / 60,
                  "metrics": {name: scorers[name].what if name in scorers else "vbench" for name in args.metrics}}
        common.write_json(args.json or os.path.join(out, "report.json"), report)
    if args.grid or args.out:
        video, size = first.frames > 1, first.picture(0)[0].size
        grid = [pictures.pixels(p, size=size) for pictures in systems.values() for p in range(min(len(prompts), 2 if video else 16))]
        common.save_grid(torch.stack(grid), args.grid or os.path.join(out, "grid.png"), columns=9 if video else min(16, len(prompts)))
    if args.out:
        with common.replacing(os.path.join(out, "table.md")) as temporary, open(temporary, "w") as file:
            file.write(text + "\n")
        if scorers:
            save_bars(rows, paper, os.path.join(out, "bars.png"))
        if args.reference in systems:
            save_differences(values, args.reference, os.path.join(out, "differences.png"))
        for name, pictures in systems.items():
            if values[name]:
                metric, scored = next(iter(values[name].items()))
                save_sheet(pictures, metric, scored, prompts, os.path.join(out, f"best-and-worst-{name}.png"))
        if args.side_by_side:
            save_page(*(systems[name] for name in args.side_by_side), values, prompts, os.path.join(out, "side-by-side.html"))


if __name__ == "__main__":
    common.launch(main)
