"""Stage 0: collects ODE pairs (x_T, x_0) from the guided teacher's deterministic sampler, the data of adversarial pre-training.

    python collect_ode.py --teacher assets/tiny-sdxl --prompts prompts/shapes_train.txt --count 4096 --out pairs/tiny
    torchrun --nproc_per_node=8 collect_ode.py --teacher sdxl --prompts prompts.txt --count 100000

Writes OUT/00000.safetensors ... (x_T, x_0 as [n, C, (F,) H, W], half precision; prompt numbers) and OUT/index.json, which says what they
are. A pair depends on --seed and its number alone: any number of processes writes the same files, and a repeated command
skips the shards that are there.
"""
import os

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from tqdm import tqdm

import common
from common import UserError


class Pairs:
    """A folder of ODE pairs. `pairs[i]` -> (x_T, x_0, prompt); rows are read from disk as they are asked for.

    UserError where the folder is not there, not complete, or of another teacher."""

    def __init__(self, folder, teacher=None):
        self.index = common.read_json(os.path.join(folder, "index.json")) or {}
        if not {"teacher", "fingerprint", "latent_shape", "count", "shard", "prompts"} <= set(self.index):
            raise UserError(f"there are no ODE pairs in {folder!r}: run collect_ode.py --teacher ... --out {folder} first")
        if teacher and self.index["fingerprint"] != teacher.fingerprint:
            raise UserError(f"the pairs in {folder} come from the teacher {self.index['teacher']}, not from {teacher.path}")
        if teacher and tuple(self.index["latent_shape"]) != teacher.latent_shape:
            raise UserError(f"the pairs in {folder} have latents {self.index['latent_shape']}, not {list(teacher.latent_shape)}; check --resolution")
        self.shards = []
        for k in range(-(-self.index["count"] // self.index["shard"])):
            path = os.path.join(folder, f"{k:05d}.safetensors")
            if not complete(path):
                raise UserError(f"the shard {path} is missing or damaged: delete it, and run collect_ode.py again")
            self.shards.append(safe_open(path, "pt"))

    def __len__(self):
        return self.index["count"]

    def __getitem__(self, i):
        return self._read(i, "x_T").float(), self._read(i, "x_0").float(), self.index["prompts"][self._read(i, "prompt")]

    def _read(self, i, name):
        shard, row = self.shards[i // self.index["shard"]], i % self.index["shard"]
        return shard.get_slice(name)[row : row + 1][0]

    def prompts(self, rows):
        """Numbers of pairs -> list of prompts."""
        return [self.index["prompts"][self._read(i, "prompt")] for i in rows]

    def batch(self, rows):
        """Numbers of pairs -> (x_T [n, ...], x_0 [n, ...], list of prompts)."""
        x_T, x_0, prompts = zip(*(self[i] for i in rows))
        return torch.stack(x_T), torch.stack(x_0), list(prompts)


def complete(path):
    """Whether the shard is there and undamaged."""
    try:
        with safe_open(path, "pt") as shard:
            return {"x_T", "x_0", "prompt"} <= set(shard.keys())
    except (OSError, SafetensorError):
        return False


def main(argv=None):
    parser = common.Parser(__doc__)
    common.add_teacher_arguments(parser)
    parser.add("--prompts", "text file, a prompt a line; pair i takes a random one", default=common.PROMPTS)
    parser.add("--out", "folder for the shards (default pairs/TEACHER)")
    parser.add("--count", "number of pairs", type=common.positive, default=4096)
    parser.add("--steps", f"of the teacher's sampler (default {common.family_default('sampler_steps')})", type=common.steps)
    parser.add("--guidance", f"classifier-free guidance scale (default {common.family_default('guidance')})", type=common.non_negative)
    parser.add("--shard", "pairs in a file", type=common.positive, default=512)
    parser.add("--seed", "of noise and prompts", type=common.seed, default=0)
    args = parser.parse_args(argv)

    prompts = common.read_prompts(args.prompts)
    device = common.own_device()  # the processes share nothing but the list of shards: no group, no waiting
    teacher = common.load_teacher_of(args, device)
    steps, guidance = args.steps or teacher.sampler_steps, teacher.guidance if args.guidance is None else args.guidance
    out = args.out or os.path.join("pairs", common.short_name(args.teacher))
    index = {"teacher": args.teacher, "fingerprint": teacher.fingerprint, "steps": steps, "guidance": guidance, "seed": args.seed,
             "resolution": teacher.resolution, "latent_shape": list(teacher.latent_shape), "count": args.count, "shard": args.shard, "prompts": prompts}
    index_path = os.path.join(out, "index.json")
    if os.path.exists(index_path) and common.read_json(index_path) != index:
        raise UserError(f"{out} holds pairs made with other settings; give another --out, or delete it")
    teacher.check(prompts)

    common.make_folder(out)
    if common.is_main():
        common.write_json(index_path, index)
    own = range(-(-args.count // args.shard))[common.rank() :: common.world_size()]
    mine = [k for k in own if not complete(os.path.join(out, f"{k:05d}.safetensors"))]
    with tqdm(total=sum(min(args.shard, args.count - k * args.shard) for k in mine), disable=not common.is_main(), unit="pair", desc="ODE pairs") as bar:
        for k in mine:
            first, last = k * args.shard, min((k + 1) * args.shard, args.count)
            parts = []
            for begin in range(first, last, args.batch):
                rows = common.Rows(range(begin, min(begin + args.batch, last)), (args.seed,), device)
                prompt = rows.integers(len(prompts))
                x_T = rows.normal(*teacher.latent_shape)
                x_0 = teacher.sample(x_T, teacher.encode([prompts[i] for i in prompt]), steps, guidance)
                parts.append((x_T.half().cpu(), x_0.half().cpu(), torch.tensor(prompt)))
                bar.update(len(prompt))
            with common.replacing(os.path.join(out, f"{k:05d}.safetensors")) as temporary:
                x_T, x_0, prompt = map(torch.cat, zip(*parts))
                save_file({"x_T": x_T, "x_0": x_0, "prompt": prompt}, temporary)


if __name__ == "__main__":
    common.launch(main)
