"""What evaluate.py measures with. A scorer judges the pictures of a prompt; evaluate.py owns files, processes and tables.

Every scorer has
    takes    what it is for: "pictures", "videos"
    what     model, weights and settings: what has to stand beside a number
    prepare(image) -> tensor, of one PIL image; of a video's frames below one another. Runs in DataLoader workers
    score(prepared [P, K, ...], P prompts) -> {name: array [P K, ...]}, K samples of each prompt; a number of a whole prompt is repeated
    result(scores, reference) -> {name: number or {name: number}}, from a list of what score() gave, and that of the reference system

Weights come from --weights-dir, laid out as DIR/OWNER/REPOSITORY/FILE, or from the caches of the hub and torch, or from the network. All
are read as tensors; nothing is unpickled.
"""
import json
import os
import re
import shutil
import subprocess
import warnings

import numpy as np
import torch
import torch.nn.functional as F

import common
from common import UserError

os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")  # they warn of the workers' forks otherwise


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


def fetched(args, url):
    """The path of a file that is published at a URL, by the same rules."""
    file, folders = os.path.basename(url), [os.path.join(torch.hub.get_dir(), "checkpoints")]
    folders = [args.weights_dir, *folders] if args.weights_dir else folders
    paths = [os.path.join(folder, file) for folder in folders]
    for path in paths:
        if os.path.exists(path):
            return path
    try:
        os.makedirs(folders[-1], exist_ok=True)
        torch.hub.download_url_to_file(url, paths[-1], progress=common.is_main())
    except OSError as error:
        raise UserError(f"the file {file} is wanted; it is not at {' nor at '.join(paths)} and could not be fetched ({error}): "
                        f"fetch {url} by hand and give --weights-dir DIR with it") from error
    return paths[-1]


def tensors(path):
    """A checkpoint's state_dict. UserError for a file that is more than tensors, or less."""
    from safetensors.torch import load_file

    try:
        state = load_file(path) if path.endswith(".safetensors") else torch.load(path, map_location="cpu", weights_only=True)
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
            path = fetched(args, self.URL[args.lpips_net])
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

        path, self.device = fetched(args, self.URL), common.own_device()
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
