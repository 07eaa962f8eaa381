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

# A metric is an object with update(pixels [P, K, 3, H, W] in [-1, 1], P prompts), which sees K pictures of each prompt, and
# result(reference) -> {name: number or {name: number}}, where `reference` is the same metric of the first system, or itself.


class Oracle:
    """What the oracle of tiny/shapes.py reads. Exact; only for teachers of that world.

    accuracy: share of pictures that are valid and show every attribute that their prompt names; accuracy_of: the same for one attribute,
    over the prompts that name it. valid: share of pictures that show one clean shape. tv: total-variation distance of an attribute's
    distribution, over the prompts that leave it open, to the reference's (of the reference itself: to uniform, as tv_uniform always).
    position_std: of the centre's coordinates, pixels. pairwise_distance: root mean square between two pictures of one prompt."""

    def __init__(self, args, prompts):
        from tiny import shapes

        self.world, self.oracle, self.read, self.wanted, self.distances = shapes, shapes.Oracle(), [], [], []
        try:
            for prompt in prompts:
                shapes.parse(prompt)
        except ValueError as error:
            raise UserError(f"--metrics oracle: {error}") from error

    def update(self, pixels, prompts):
        P, K = pixels.shape[:2]
        try:
            self.read.append(self.oracle.read(pixels.flatten(0, 1).numpy()))
        except ValueError as error:
            raise UserError(f"--metrics oracle is for the tiny teachers: {error}") from error
        self.wanted += [self.world.parse(prompt) for prompt in prompts for _ in range(K)]
        if K > 1:
            distance = torch.cdist(pixels.flatten(2), pixels.flatten(2)) / pixels[0, 0].numel() ** 0.5
            self.distances.append(distance.sum((1, 2)) / (K * (K - 1)))

    def shares(self, name):
        """The distribution of an attribute over the pictures whose prompt leaves it open."""
        read = np.concatenate([part[name] for part in self.read])
        values = read[[wanted[name] is None for wanted in self.wanted]]
        return np.bincount(values, minlength=len(self.world.ATTRIBUTES[name])) / len(values)

    def result(self, reference):
        read = {name: np.concatenate([part[name] for part in self.read]) for name in self.read[0]}
        named = {name: np.array([wanted[name] is not None for wanted in self.wanted]) for name in self.world.ATTRIBUTES}
        right = {name: np.array([wanted[name] in (None, value) for wanted, value in zip(self.wanted, read[name])]) for name in named}
        shares = {name: self.shares(name) for name in named if not named[name].all()}
        tv_uniform = {name: 0.5 * np.abs(p - 1 / len(p)).sum() for name, p in shares.items()}
        tv = tv_uniform if reference is self else {name: 0.5 * np.abs(p - reference.shares(name)).sum() for name, p in shares.items()}
        return {"accuracy": np.mean(np.all(list(right.values()), axis=0) & read["valid"]), "valid": read["valid"].mean(),
                "accuracy_of": {name: right[name][named[name]].mean() for name in named if named[name].any()}, "tv": tv, "tv_uniform": tv_uniform,
                "position_std": np.sqrt((read["x"].var() + read["y"].var()) / 2),
                **({"pairwise_distance": torch.cat(self.distances).mean()} if self.distances else {})}


class Clip:
    """100 x cosine of CLIP's picture and text embeddings (open_clip): any of its models, weights by tag or from a local checkpoint."""

    def __init__(self, args, prompts):
        import open_clip

        self.device = common.own_device()
        try:
            self.model, _, self.preprocess = open_clip.create_model_and_transforms(args.clip_model, pretrained=args.clip_weights, device=self.device)
        except (OSError, RuntimeError, ValueError) as error:
            raise UserError(f"CLIP {args.clip_model} with weights {args.clip_weights} could not be loaded: {common.first_line(error)}") from error
        self.model.eval()
        self.tokenize, self.prefix, self.scores = open_clip.get_tokenizer(args.clip_model), args.clip_prefix, []

    @torch.no_grad()
    def update(self, pixels, prompts):
        from torchvision.transforms.functional import to_pil_image

        pictures = torch.stack([self.preprocess(to_pil_image(p / 2 + 0.5)) for p in pixels.flatten(0, 1)]).to(self.device)
        texts = self.tokenize([self.prefix + prompt for prompt in prompts]).to(self.device)
        picture = self.model.encode_image(pictures, normalize=True)
        text = self.model.encode_text(texts, normalize=True).repeat_interleave(pixels.shape[1], 0)
        self.scores.append(100 * (picture * text).sum(1).cpu())

    def result(self, reference):
        return {"clip": torch.cat(self.scores).mean()}


class Lpips:
    """Mean LPIPS distance over all pairs of the pictures of a prompt; pixels in [-1, 1], as lpips expects them."""

    def __init__(self, args, prompts):
        import lpips

        if args.seeds < 2:
            raise UserError("--metrics lpips compares pictures of one prompt: give --seeds 2 or more")
        self.device, self.scores = common.own_device(), []
        try:
            self.distance = lpips.LPIPS(net=args.lpips_net, verbose=False)
        except OSError as error:
            where = os.path.join(torch.hub.get_dir(), "checkpoints")
            raise UserError(f"the {args.lpips_net} backbone of LPIPS is not in {where} and could not be fetched: {error}") from error
        self.distance.to(self.device).eval()

    @torch.no_grad()
    def update(self, pixels, prompts):
        first, second = torch.triu_indices(pixels.shape[1], pixels.shape[1], offset=1)
        for pictures in pixels.to(self.device):
            if pictures.shape[-1] < 64:  # AlexNet's strides need that much
                pictures = torch.nn.functional.interpolate(pictures, (64, 64), mode="nearest")
            self.scores.append(self.distance(pictures[first], pictures[second]).mean().cpu())

    def result(self, reference):
        return {"lpips": torch.stack(self.scores).mean()}


METRICS = {"oracle": Oracle, "clip": Clip, "lpips": Lpips}


def main(argv=None):
    parser = common.Parser(__doc__)
    add_system_arguments(parser)
    parser.add("--student", "NAME=FOLDER, a run folder of adp.py or adm.py; may be given several times", action="append", default=[])
    parser.add("--prompts", "text file, a prompt a line", required=True)
    parser.add("--seeds", "pictures of every prompt", type=common.positive, default=8)
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
    metrics = {system: {name: METRICS[name](args, prompts) for name in names} for system in systems}

    rows, grid = [], []
    chunk = max(1, args.batch // args.seeds)
    for name, system in systems.items():
        seconds = 0.0
        for first in tqdm(range(0, len(prompts), chunk), desc=name, unit="batch"):
            numbers = range(first, min(first + chunk, len(prompts)))
            texts = [prompts[i] for i in numbers]
            start = time.perf_counter()
            pixels = torch.stack([system.pictures(texts, numbers, args.seed + k) for k in range(args.seeds)], dim=1)  # [P, K, 3, H, W]
            seconds += time.perf_counter() - start
            for metric in metrics[name].values():
                metric.update(pixels, texts)
            grid += pixels[: max(0, 16 - first), 0]
        row = {"system": name, "steps": system.steps, "nfe": system.nfe, "prompts": len(prompts), "samples": len(prompts) * args.seeds}
        for metric, reference in zip(metrics[name].values(), next(iter(metrics.values())).values()):
            row |= metric.result(reference)
        rows.append(plain(row | {"seconds_per_image": seconds / row["samples"]}))

    print(table(rows))
    if args.grid:
        common.save_grid(torch.stack(grid), args.grid, columns=min(16, len(prompts)))
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
