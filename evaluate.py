"""Measures students beside their teacher: one set of prompts and seeds, a row a system.

    python evaluate.py --teacher assets/tiny-sdxl --student adp=runs/adp --student dmdx=runs/adm --prompts prompts/shapes_eval.txt
    python evaluate.py --teacher sdxl --student dmdx=runs/adm-sdxl --prompts coco.txt --seeds 1 --metrics clip --json report.json

Metrics: `oracle` (tiny teachers only: exact numbers), `clip` (open_clip) and `lpips` (diversity: the mean distance between pictures
of the same prompt). Prints a Markdown table; --json and --grid write the numbers and a picture with a row a system.
"""
import os
import subprocess
import time

import numpy as np
import torch
from tqdm import tqdm

import common
from common import UserError
from sample import System, add_system_arguments, load_teacher

# A metric is an object with score(pixels [P, K, 3, (F,) H, W] in [-1, 1], P prompts), which sees K samples of each prompt, and
# result(scores, reference) -> {name: number or {name: number}}: `scores` is the list of what score() gave for a system, `reference` that
# of the first system.


class Oracle:
    """What the oracle of tiny/shapes.py reads. Exact; only for teachers of that world.

    accuracy: share of samples that are valid and show every attribute that their prompt names; accuracy_of: the same for one attribute,
    over the prompts that name it. valid: share of samples that show one clean shape. tv: total-variation distance of an attribute's
    distribution, over the prompts that leave it open, to the reference's (of the reference itself: to uniform, as tv_uniform always).
    position_std: of the centre's coordinates, pixels. pairwise_distance: root mean square between two samples of one prompt."""

    def __init__(self, args, prompts, video):
        from tiny import shapes

        self.parse, self.attributes = shapes.parse, shapes.VIDEO if video else shapes.ATTRIBUTES
        self.oracle = shapes.VideoOracle() if video else shapes.Oracle()
        try:
            for prompt in prompts:
                self.parse(prompt)
        except ValueError as error:
            raise UserError(f"--metrics oracle: {error}") from error

    def score(self, pixels, prompts):
        """Each attribute as read, int [P K]; each as wanted, -1 where the prompt leaves it open; and the distances [P], if K > 1."""
        P, K = pixels.shape[:2]
        try:
            read = self.oracle.read(pixels.flatten(0, 1).numpy())
        except ValueError as error:
            raise UserError(f"--metrics oracle is for the tiny teachers: {error}") from error
        wanted = [self.parse(prompt) for prompt in prompts for _ in range(K)]
        read |= {f"wanted {name}": np.array([-1 if w.get(name) is None else w[name] for w in wanted]) for name in self.attributes}
        if K > 1:
            distance = torch.cdist(pixels.flatten(2), pixels.flatten(2)) / pixels[0, 0].numel() ** 0.5
            read["distance"] = (distance.sum((1, 2)) / (K * (K - 1))).numpy()
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
        return {"accuracy": np.mean(np.all([right[name] | ~named[name] for name in named], axis=0) & read["valid"]), "valid": read["valid"].mean(),
                "accuracy_of": {name: right[name][named[name]].mean() for name in named if named[name].any()}, "tv": tv, "tv_uniform": tv_uniform,
                "position_std": np.sqrt((read["x"].var() + read["y"].var()) / 2),
                **({"pairwise_distance": read["distance"].mean()} if "distance" in read else {})}


class Clip:
    """100 x cosine of CLIP's picture and text embeddings (open_clip): any of its models, weights by tag or from a local checkpoint."""

    def __init__(self, args, prompts, video):
        open_clip = common.needed("open_clip", "open_clip_torch", "computes the CLIP score")
        if video:
            raise UserError("--metrics clip is for pictures, not for video")
        self.device = common.own_device()
        try:
            self.model, _, self.preprocess = open_clip.create_model_and_transforms(args.clip_model, pretrained=args.clip_weights, device=self.device)
        except (OSError, RuntimeError, ValueError) as error:
            raise UserError(f"CLIP {args.clip_model} with weights {args.clip_weights} could not be loaded: {common.first_line(error)}") from error
        self.model.eval()
        self.tokenize, self.prefix = open_clip.get_tokenizer(args.clip_model), args.clip_prefix

    @torch.no_grad()
    def score(self, pixels, prompts):
        from torchvision.transforms.functional import to_pil_image

        pictures = torch.stack([self.preprocess(to_pil_image(p / 2 + 0.5)) for p in pixels.flatten(0, 1)]).to(self.device)
        texts = self.tokenize([self.prefix + prompt for prompt in prompts]).to(self.device)
        picture = self.model.encode_image(pictures, normalize=True)
        text = self.model.encode_text(texts, normalize=True).repeat_interleave(pixels.shape[1], 0)
        return 100 * (picture * text).sum(1).cpu()

    def result(self, scores, reference):
        return {"clip": torch.cat(scores).mean()}


class Lpips:
    """Mean LPIPS distance over all pairs of the pictures of a prompt; pixels in [-1, 1], as lpips expects them."""

    def __init__(self, args, prompts, video):
        lpips = common.needed("lpips", "lpips", "computes the LPIPS diversity")
        if video:
            raise UserError("--metrics lpips is for pictures, not for video")
        if args.seeds < 2:
            raise UserError("--metrics lpips compares pictures of one prompt: give --seeds 2 or more")
        self.device = common.own_device()
        try:
            self.distance = lpips.LPIPS(net=args.lpips_net, verbose=False)
        except OSError as error:
            where = os.path.join(torch.hub.get_dir(), "checkpoints")
            raise UserError(f"the {args.lpips_net} backbone of LPIPS is not in {where} and could not be fetched: {error}") from error
        self.distance.to(self.device).eval()

    @torch.no_grad()
    def score(self, pixels, prompts):
        first, second = torch.triu_indices(pixels.shape[1], pixels.shape[1], offset=1)
        if pixels.shape[-1] < 64:  # AlexNet's strides need that much
            pixels = torch.nn.functional.interpolate(pixels.flatten(0, 1), (64, 64), mode="nearest").unflatten(0, pixels.shape[:2])
        return torch.stack([self.distance(pictures[first], pictures[second]).mean().cpu() for pictures in pixels.to(self.device)])

    def result(self, scores, reference):
        return {"lpips": torch.cat(scores).mean()}


METRICS = {"oracle": Oracle, "clip": Clip, "lpips": Lpips}


def main(argv=None):
    parser = common.Parser(__doc__)
    add_system_arguments(parser)
    parser.add("--student", "NAME=FOLDER, a run folder of adp.py or adm.py; may be given several times", action="append", default=[])
    parser.add("--prompts", "text file, a prompt a line", required=True)
    parser.add("--seeds", "samples of every prompt", type=common.positive, default=8)
    parser.add("--seed", "first of the seeds", type=common.whole, default=0)
    parser.add("--metrics", "comma-separated: " + ", ".join(METRICS), default="oracle")
    parser.add("--clip-model", "open_clip model", default="ViT-g-14")
    parser.add("--clip-weights", "open_clip tag or a local checkpoint", default="laion2b_s12b_b42k")
    parser.add("--clip-prefix", "put before every prompt", default="A photo depicts ")
    parser.add("--lpips-net", "backbone", choices=("alex", "vgg"), default="alex")
    parser.add("--json", "file for the numbers")
    parser.add("--grid", "file for a picture with a row a system")
    parser.add("--since", "Unix time at which the work began that the report is of, for its minutes", type=float, default=time.time())
    args = parser.parse_args(argv)

    prompts = common.read_prompts(args.prompts)
    names = args.metrics.split(",")
    unknown = [name for name in names if name not in METRICS]
    if unknown:
        raise UserError(f"there is no metric {unknown[0]!r}; known are {', '.join(METRICS)}")
    students = [student.split("=", 1) if "=" in student else (common.short_name(student), student) for student in args.student]
    for path in filter(None, (args.json, args.grid)):
        common.make_folder(os.path.dirname(path) or ".")
    teacher = load_teacher(args, [folder for _, folder in students])
    teacher.check(prompts)
    systems = {"teacher": System(teacher, None, args.steps, args.guidance)} if args.teacher else {}
    systems |= {name: System(teacher, folder) for name, folder in students}
    metrics = {name: METRICS[name](args, prompts, teacher.video) for name in names}

    rows, grid, reference = [], [], None
    chunk = max(1, args.batch // args.seeds)
    for name, system in systems.items():
        seconds, scores = 0.0, {metric: [] for metric in metrics}
        for first in tqdm(range(0, len(prompts), chunk), desc=name, unit="batch"):
            numbers = range(first, min(first + chunk, len(prompts)))
            texts = [prompts[i] for i in numbers]
            start = time.perf_counter()
            pixels = system.pictures(texts, numbers, range(args.seed, args.seed + args.seeds))
            seconds += time.perf_counter() - start
            for metric in metrics:
                scores[metric].append(metrics[metric].score(pixels, texts))
            grid += pixels[: max(0, (2 if teacher.video else 16) - first), 0]
        reference = reference or scores
        row = {"system": name, "steps": system.steps, "nfe": system.nfe, "prompts": len(prompts), "samples": len(prompts) * args.seeds}
        for metric in metrics:
            row |= metrics[metric].result(scores[metric], reference[metric])
        rows.append(plain(row | {"seconds_per_image": seconds / row["samples"]}))

    print(table(rows))
    if args.grid:
        common.save_grid(torch.stack(grid), args.grid, columns=9 if teacher.video else min(16, len(prompts)))
    if args.json:
        report = {"rows": rows, "seed": args.seed, "commit": commit(), "minutes": (time.time() - args.since) / 60, "metrics": names}
        common.write_json(args.json, report)


def plain(value):
    """Numbers of numpy and torch -> Python's own, rounded to what means something."""
    if isinstance(value, dict):
        return {name: plain(v) for name, v in value.items()}
    return value if isinstance(value, (str, int)) else round(float(value), 5)


def table(rows):
    """Rows -> a Markdown table; a dictionary's values are joined by slashes."""
    columns = [name for name in rows[0] if name not in ("prompts", "tv_uniform", "accuracy_of")]
    cell = lambda v: "/".join(f"{x:.2f}" for x in v.values()) if isinstance(v, dict) else f"{v:.3f}" if isinstance(v, float) else str(v)
    heads = [f"{name} {'/'.join(rows[0][name])}" if isinstance(rows[0][name], dict) else name for name in columns]
    lines = [heads, ["---"] * len(columns), *([cell(row[name]) for name in columns] for row in rows)]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)


def commit():
    """The repository's commit, "unknown" outside git."""
    try:
        return subprocess.run(["git", "rev-parse", "HEAD"], cwd=os.path.dirname(os.path.abspath(__file__)), capture_output=True, text=True, check=True).stdout.strip()
    except (OSError, subprocess.CalledProcessError):
        return "unknown"


if __name__ == "__main__":
    common.launch(main)
