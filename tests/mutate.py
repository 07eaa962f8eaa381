"""Changes one line of the method at a time, as a careless hand could, and counts what no test notices.

    python tests/mutate.py                 # all of them
    python tests/mutate.py --only hinge    # those with this word in their names

Each change is made in a copy of the repository (what git tracks, as it is now), never in place."""

import argparse
import os
import shutil
import subprocess
import sys
import tempfile
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass

ROOT = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))
OF_THE_STAGES = ["tests/test_method.py", "tests/test_gradients.py"]
OF_THE_PARTS = ["tests/test_discriminators.py", "tests/test_maths.py", "tests/test_families.py"]
SLOW = ["tests/test_distributed.py::test_lora_leaves_the_backbone_as_it_was_and_saves_what_it_trains"]
OF_CHECKPOINTS = ["tests/test_lora_files.py", "tests/test_resume.py", "tests/test_plain_diffusers.py"]
OF_FILES = {  # a file's or folder's, where they are others or come in another order
    "adm.py": OF_THE_STAGES + OF_THE_PARTS + SLOW,
    "adp.py": OF_THE_STAGES + OF_THE_PARTS + SLOW,
    "evaluate.py": ["tests/test_indexes.py", "tests/test_evaluate.py"],
    "metrics/": [f"tests/test_{name}.py" for name in ("metrics", "images", "indexes", "evaluate")],
    "sample.py": ["tests/test_indexes.py", "tests/test_errors.py", "tests/test_export.py"],
    "support/offload.py": ["tests/test_resume.py", "tests/test_evaluate.py"],
    "support/pairs.py": [*OF_THE_PARTS, "tests/test_resume.py"],
    "support/parallel.py": ["tests/test_maths.py", "tests/test_distributed.py"],
    "tools/plan.py": ["tests/test_plan.py"],
    "tools/trace.py": ["tests/test_plan.py"],
    "support/checkpoints.py": OF_CHECKPOINTS,
    "support/export.py": ["tests/test_export.py"],
    "support/errors.py": ["tests/test_errors.py", "tests/test_teachers.py"],
    "support/files.py": ["tests/test_errors.py"],
    "support/loading.py": ["tests/test_teachers.py", *OF_THE_PARTS, *OF_THE_STAGES],
    "support/inputs.py": ["tests/test_errors.py", "tests/test_resume.py"],
    "support/outputs.py": ["tests/test_errors.py"],
    "support/prompts.py": ["tests/test_prompts.py"],
    "support/lora_files.py": OF_CHECKPOINTS,
    "support/teacher_lora.py": ["tests/test_lora_files.py"],
    "support/run.py": [
        *("tests/test_resume.py", "tests/test_stopping.py", "tests/test_errors.py"),
        "tests/test_distributed.py::test_a_rank_that_hangs_in_an_iteration_is_not_waited_for_as_a_checkpoint_is",
    ],
    "teachers/": ["tests/test_families.py", *OF_THE_STAGES, "test_smoke.py"],
}
PATIENCE = 1800  # seconds for one change


@dataclass
class Mutation:
    """A piece of one line and what it becomes; it must be in the file exactly once."""

    file: str
    name: str
    old: str
    new: str

    def change(self, text):
        """The file's text -> the text with this change. ValueError where the piece is not there once."""
        count = text.count(self.old)
        if count != 1:
            raise ValueError(f"{self.name}: {self.old!r} is {count} times in {self.file}")
        return text.replace(self.old, self.new)


# {mutation: why no test can notice it}
EQUAL = {}

# {file: (name, piece of a line, what it becomes) each}
TABLE = {
    "adm.py": [
        ("--accumulate keeps every graph", "student_learns and len(batch) == 1):", "student_learns):"),
        (
            "adm.py's --prompt-column forgotten",
            "read_training_prompts(args.prompts, args.prompt_column)",
            "read_training_prompts(args.prompts)",
        ),
        # the secant
        ("a secant from x_real", "broadcast((D_real - D_fake)", "broadcast((D_fake - D_real)"),
        ("a secant of any length", "rise / mean_of_rows(difference.square()).clamp(min=1e-12)", "rise"),
        (
            "a secant of lines not squared",
            "mean_of_rows(difference.square())",
            "mean_of_rows(difference.abs())",
        ),
        ("a secant that may be none over none", ".clamp(min=1e-12)", ""),
        (
            "the secant's maps of x_real are x_fake's",
            "b.maps_real = self.teacher.features(b.x_real",
            "b.maps_real = self.teacher.features(b.x_fake",
        ),
        ("a line's slope is dt", "slope = 1 / self.args.dt", "slope = self.args.dt"),
        ("the line away from x_real", "slope * (b.x_real - b.x_fake)", "slope * (b.x_fake - b.x_real)"),
        ("a line away from x_real", "difference = b.x_real - b.x_fake", "difference = b.x_fake - b.x_real"),
        # the networks
        ("dt in T's units", "self.args.dt * T", "self.args.dt"),
        (
            "f starts from the student",
            'teacher.trainable(args, "fake")',
            'teacher.trainable(args, "fake", folder)',
        ),
        (
            "G starts from the teacher",
            'teacher.trainable(args, "student", folder)',
            'teacher.trainable(args, "student")',
        ),
        ("the average is of f", "MovingAverage(self.G, args.ema)", "MovingAverage(self.f, args.ema)"),
        ("the average stands still", "adm.ema.step()", "adm.ema"),
        ("f learns at G's rate", "adm.opt_f: args.fake_lr", "adm.opt_f: args.lr"),
        ("D learns at G's rate", "adm.opt_heads: args.head_lr", "adm.opt_heads: args.lr"),
        # line 1
        ("t' is always T", "draw_integer(self.student.steps,", "draw_integer(1,"),
        ("t' without the seed", '"t_prime", self.args.seed,', '"t_prime", 0,'),
        (
            "t' alike in all updates",
            "self.args.seed, step, update)\n        rngs",
            "self.args.seed, step, 0)\n        rngs",
        ),
        ("one prompt for all", "rng.choose(self.prompts)", "self.prompts[: len(rng.generators)]"),
        ("backward simulation by f", "self.student.simulate(self.G,", "self.student.simulate(self.f,"),
        ("no backward simulation", "b.rng, b.cond, b.k)", "b.rng, b.cond, 0)"),
        ("G is told T", "self.G_train, b.x_t_prime, b.k, b.cond", "self.G_train, b.x_t_prime, 0, b.cond"),
        # line 2
        ("f's loss reaches G", "x_0 = b.x0_hat.detach()", "x_0 = b.x0_hat"),
        ("f's times to T/2", "t = b.rng.uniform() * T\n", "t = b.rng.uniform() * T / 2\n"),
        (
            "f's input noised to t/2",
            "x_t = self.teacher.diffuse(x_0, eps, t)",
            "x_t = self.teacher.diffuse(x_0, eps, t / 2)",
        ),
        (
            "f without the prompt",
            "self.teacher.raw(self.f_train, x_t, t, b.cond)",
            "self.teacher.raw(self.f_train, x_t, t, self.teacher.null(len(x_t)))",
        ),
        ("f's target at t/2", "self.teacher.target(x_0, eps, t))", "self.teacher.target(x_0, eps, t / 2))"),
        ("f's target of x_t", "self.teacher.target(x_0, eps, t))", "self.teacher.target(x_t, eps, t))"),
        # line 3
        (
            "line 3's times are line 2's",
            "t = (high - b.rng.uniform() * (high - low)) * T",
            "t = b.rng.uniform() * T",
        ),
        (
            "line 3's times from T",
            "t = (high - b.rng.uniform() * (high - low)) * T",
            "t = (1 - b.rng.uniform() * (1 - low)) * T",
        ),
        (
            "line 3's times without dt",
            "t = (high - b.rng.uniform() * (high - low)) * T",
            "t = (high - b.rng.uniform() * high) * T",
        ),
        (
            "line 3's sample without a graph",
            "self.teacher.diffuse(b.x0_hat, eps, t), t",
            "self.teacher.diffuse(b.x0_hat.detach(), eps, t), t",
        ),
        ("s = t", "b.s = t - self.args.dt * T", "b.s = t"),
        ("a step to t + dt", "t - self.args.dt * T", "(t + self.args.dt * T).clamp(max=T)"),
        (
            "x_fake by G",
            "x0_fake, eps_fake = self.teacher.predict(self.f,",
            "x0_fake, eps_fake = self.teacher.predict(self.G,",
        ),
        (
            "f's eps_hat is detached",
            "self.teacher.step(x0_fake, eps_fake, b.s)",
            "self.teacher.step(x0_fake, eps_fake.detach(), b.s)",
        ),
        (
            "f's x0_hat is detached",
            "self.teacher.step(x0_fake, eps_fake, b.s)",
            "self.teacher.step(x0_fake.detach(), eps_fake, b.s)",
        ),
        (
            "x_fake at t",
            "self.teacher.step(x0_fake, eps_fake, b.s)",
            "self.teacher.step(x0_fake, eps_fake, t)",
        ),
        (
            "x_real unguided",
            "x0_real, eps_real = self.teacher.guided(x_t, t, b.cond, self.args.guidance)",
            "x0_real, eps_real = self.teacher.guided(x_t, t, b.cond, 1)",
        ),
        (
            "x_real at t",
            "self.teacher.step(x0_real, eps_real, b.s)",
            "self.teacher.step(x0_real, eps_real, t)",
        ),
        (
            "x_real by f's noise",
            "self.teacher.step(x0_real, eps_real, b.s)",
            "self.teacher.step(x0_real, eps_fake, b.s)",
        ),
        (
            "D without the prompt in G's step",
            "self.teacher.features(x_fake, b.s, b.cond)",
            "self.teacher.features(x_fake, b.s, self.teacher.null(len(x_fake)))",
        ),
        (
            "D at t in G's step",
            "self.teacher.features(x_fake, b.s, b.cond)",
            "self.teacher.features(x_fake, t, b.cond)",
        ),
        (
            "G's step sees a detached x_fake",
            "maps_fake = self.teacher.features(x_fake,",
            "maps_fake = self.teacher.features(x_fake.detach() + 0 * x_fake,",
        ),
        (
            "cosine with the way back",
            "watch_gradient(x_fake, b.x_real - b.x_fake,",
            "watch_gradient(x_fake, b.x_fake - b.x_real,",
        ),
        (
            "the gradient off the line",
            "return (along * line)",
            "return (gradient.flatten(1) - along * line)",
        ),
        ("f's step keeps no gradient", " and not self.args.straight_through", " and False"),
        ("straight through to nothing", "(x_t - x_t.detach())", "0 * x_t"),
        ("the gradient as it is", "if self.args.project:", "if not self.args.project:"),
        ("the line with its length", "F.normalize(difference.flatten(1))", "difference.flatten(1)"),
        # DMD
        (
            "DMD unguided",
            "x0_real, _ = self.teacher.guided(x_t, t, b.cond, self.args.guidance)",
            "x0_real, _ = self.teacher.guided(x_t, t, b.cond, 1)",
        ),
        (
            "DMD's goal is behind",
            "goal = b.x0_hat - self.dmd_direction",
            "goal = b.x0_hat + self.dmd_direction",
        ),
        ("DMD's direction flipped", "direction = (x0_fake - x0_real)", "direction = (x0_real - x0_fake)"),
        ("DMD's direction unscaled", " / mean_of_rows((x0_hat - x0_real).abs())", ""),
        (
            "DMD's size is of x0_fake",
            "mean_of_rows((x0_hat - x0_real).abs())",
            "mean_of_rows((x0_hat - x0_fake).abs())",
        ),
        (
            "DMD's loss without the half",
            "0.5 * F.mse_loss(b.x0_hat, goal)",
            "F.mse_loss(b.x0_hat, goal)",
        ),
        ("the spread of what is not the student's", "std=x0_hat.flatten", "std=x0_real.flatten"),
        ("DMD's logged loss without the half", "dmd_loss=0.5 * direction", "dmd_loss=direction"),
        # line 4
        ("D's labels swapped", "hinge_discriminator(D_real, D_fake)", "hinge_discriminator(D_fake, D_real)"),
        (
            "D without the prompt for x_real",
            "b.maps_real or self.teacher.features(b.x_real, b.s, b.cond)",
            "b.maps_real or self.teacher.features(b.x_real, b.s, self.teacher.null(len(b.x_real)))",
        ),
        (
            "D's real sample is the fake one",
            "b.maps_real or self.teacher.features(b.x_real, b.s, b.cond)",
            "b.maps_real or self.teacher.features(b.x_fake, b.s, b.cond)",
        ),
        ("D_gap flipped", "D_gap=(D_real - D_fake).mean()", "D_gap=(D_fake - D_real).mean()"),
        ("R1 with R2's weight", "D_real, b, self.args.r1)", "D_real, b, self.args.r2)"),
        ("R2 with R1's weight", "D_fake, b, self.args.r2)", "D_fake, b, self.args.r1)"),
        ("R2 near x_real", "self.penalty(b.x_fake, D_fake", "self.penalty(b.x_real, D_fake"),
        ("R1 and R2 subtracted", "D_fake) + r1 + r2", "D_fake) - r1 - r2"),
        ("penalty's noise of size 1", "x + self.args.r_noise * b", "x + b"),
        (
            "penalty without the prompt",
            "self.teacher.features(x_near, b.s, b.cond)",
            "self.teacher.features(x_near, b.s, self.teacher.null(len(x)))",
        ),
        ("penalty of every head", "self.heads_train(maps)).mean(1)", "self.heads_train(maps))"),
        ("penalty without 1/s^2", "change.square().mean() / self.args.r_noise**2", "change.square().mean()"),
        ("penalty without dt", "* self.args.dt * slope", "* slope"),
        ("penalty without N", "* x[0].numel() *", "*"),
        ("penalty's N is of the batch", "* x[0].numel() *", "* x.numel() *"),
        # an iteration
        ("an update too many", "range(args.ttur)", "range(args.ttur + 1)"),
        ("G learns in the first update", "update == args.ttur - 1", "update == 0"),
        ("G learns in every update", "update == args.ttur - 1", "update <= args.ttur"),
        ("warm-up too long", "step >= args.warmup", "step > args.warmup"),
        ("the baseline asks the teacher in vain", "elif adm.heads:", "else:"),
        ("f learns from line 3", "freeze(adm.f, adm.heads)", "freeze(adm.heads)"),
        ("D learns from line 3", "freeze(adm.f, adm.heads)", "freeze(adm.f)"),
        ("f's optimiser is G's", "adm.f_train, adm.opt_f,", "adm.f_train, adm.opt_G,"),
        ("D's optimiser is f's", "adm.heads_train, adm.opt_heads,", "adm.heads_train, adm.opt_f,"),
    ],
    "adp.py": [
        (
            "ADP on the teacher's path",
            'common.Student(teacher, "velocity", steps=1)',
            'common.Student(teacher, "teacher", steps=1)',
        ),
        (
            "ADP's average is of the heads",
            "MovingAverage(self.G, args.ema)",
            "MovingAverage(self.heads, args.ema)",
        ),
        (
            "lambda of the pixels for the latents",
            "args.lambda_latent / n_latent",
            "args.lambda_pixel / n_latent",
        ),
        (
            "lambda of the latents for the pixels",
            "args.lambda_pixel / n_pixel",
            "args.lambda_latent / n_pixel",
        ),
        ("latent heads are summed", "args.lambda_latent / n_latent", "args.lambda_latent"),
        ("pixel heads are summed", "args.lambda_pixel / n_pixel", "args.lambda_pixel"),
        ("pairs the wrong way round", "x_T, x_0 = self.pairs", "x_0, x_T = self.pairs"),
        (
            "ADP's times biased to data",
            "t = (1 - b.rng.uniform() ** self.args.time_power) * T",
            "t = b.rng.uniform() ** self.args.time_power * T",
        ),
        ("ADP's times squared", "b.rng.uniform() ** self.args.time_power", "b.rng.uniform() ** 2"),
        (
            "ADP's path the wrong way round",
            "self.student.diffuse(b.x_0, x_T, t)",
            "self.student.diffuse(x_T, b.x_0, t)",
        ),
        ("the velocity's sign", "F.mse_loss(velocity, x_T - b.x_0)", "F.mse_loss(velocity, b.x_0 - x_T)"),
        ("x~_0 = x_t + r v", "return x_t - self.student.ratio", "return x_t + self.student.ratio"),
        ("x~_0 = x_t - v", "self.student.ratio(t, x_t) * velocity", "velocity"),
        ("t' to T/2", "b.t_prime = b.rng.uniform() * T", "b.t_prime = b.rng.uniform() * T / 2"),
        ("the mse's weight ignored", "+ self.args.mse * error", "+ error"),
        (
            "G's step without weights",
            "hinge_generator(self.heads(maps_fake), self.weights)",
            "hinge_generator(self.heads(maps_fake))",
        ),
        (
            "real latents are not noised",
            "self.teacher.diffuse(x_0, b.rng.normal_like(x_0), b.t_prime)",
            "self.teacher.diffuse(x_0, b.rng.normal_like(x_0), b.t_prime * (x_0 is not b.x_0))",
        ),
        ("noise that is not noise", "b.rng.normal_like(x_0), b.t_prime", "x_0, b.t_prime"),
        ("D sees clean latents", "self.teacher.features(x_t_prime,", "self.teacher.features(x_0,"),
        (
            "D is told T",
            "features(x_t_prime, b.t_prime, b.cond)",
            "features(x_t_prime, 0 * b.t_prime + T, b.cond)",
        ),
        (
            "D_tau1 without the prompt",
            "features(x_t_prime, b.t_prime, b.cond)",
            "features(x_t_prime, b.t_prime, self.teacher.null(len(x_0)))",
        ),
        ("pixels of noisy latents", "self.teacher.decode(x_0)", "self.teacher.decode(x_t_prime)"),
        ("pixels without a graph", "self.teacher.decode(x_0)", "self.teacher.decode(x_0.detach())"),
        (
            "ADP's labels swapped",
            "hinge_discriminator(D_real, D_fake, self.weights)",
            "hinge_discriminator(D_fake, D_real, self.weights)",
        ),
        (
            "ADP's D without weights",
            "hinge_discriminator(D_real, D_fake, self.weights)",
            "hinge_discriminator(D_real, D_fake)",
        ),
        (
            "D_real logged for D_fake",
            "D_fake=weigh(D_fake, self.weights)",
            "D_fake=weigh(D_real, self.weights)",
        ),
        ("ADP's warm-up too long", "if step < adp.args.warmup:", "if step <= adp.args.warmup:"),
        ("ADP's heads learn from G's loss", "with freeze(adp.heads):", "with freeze():"),
        (
            "ADP's optimiser of the wrong network",
            "adp.heads_train, adp.opt_heads,",
            "adp.heads_train, adp.opt_G,",
        ),
        (
            "warm-up for flow",
            '0 if teacher.prediction == "flow" else 500',
            '500 if teacher.prediction == "flow" else 0',
        ),
        (
            "the warm-up's rate after it",
            "args.warmup_lr if step < args.warmup else args.lr",
            "args.lr if step < args.warmup else args.warmup_lr",
        ),
    ],
    "support/configs.py": [
        (
            "latents multiplied by the scale",
            'latents / config.get("scaling_factor", 1)',
            'latents * config.get("scaling_factor", 1)',
        ),
        ("latents not scaled", 'latents / config.get("scaling_factor", 1)', "latents"),
        (
            "latents' shift subtracted",
            '+ (config.get("shift_factor") or 0)',
            '- (config.get("shift_factor") or 0)',
        ),
        ("latents' mean subtracted", "latents * std + mean", "latents * std - mean"),
        ("latents' deviation divided by", "latents * std + mean", "latents / std + mean"),
    ],
    "collect_ode.py": [
        ("pairs of any guidance", '"guidance": args.guidance,', '"guidance": teacher.guidance,'),
        ("pairs of any seed", '"seed": args.seed,', '"seed": 0,'),
        (
            "pairs without guidance have the default",
            "teacher.guidance if args.guidance is None else args.guidance",
            "args.guidance or teacher.guidance",
        ),
        (
            "the pairs' --prompt-column forgotten",
            "read_training_prompts(args.prompts, args.prompt_column)",
            "read_training_prompts(args.prompts)",
        ),
        ("pairs without the seed", '("pairs", args.seed)', '("pairs", 0)'),
        (
            "pairs keyed by their place in the batch",
            "draw(args, numbers[first : first + args.batch],",
            "draw(args, range(len(numbers[first : first + args.batch])),",
        ),
        ("pairs unguided", "args.steps, args.guidance)\n        if", "args.steps, 1)\n        if"),
        (
            "pairs of the first prompts",
            "teacher.encode(chosen)",
            "teacher.encode(prompts[: len(chosen)])",
        ),
        ("pairs' prompts by their place in the file", "places[text] for", "prompts.index(text) for"),
        ("an index of all prompts", "if prompt in drawn]", "]"),
        ("x_T written as x_0", '"x_0": x_0, "prompt"', '"x_0": x_T, "prompt"'),
        ("shards overlap", "range(k * args.shard_size, min(", "range(k * args.shard_size // 2, min("),
    ],
    "common.py": [
        ("a block's first residual", "out[1][last]))", "out[1][0]))"),
        ("halvings by a video's frames", "min(shape[-2:]))) - 2", "min(shape[1:]))) - 2"),
        (
            "a student that forgets its guidance",
            'guidance = meta["arguments"].get("student_guidance")',
            "guidance = None",
        ),
        ("SDXL's pairs in twice the steps", "sampler_steps = 25", "sampler_steps = 50"),
        ("SD3 guided as SDXL", "    guidance = 7.0", "    guidance = 5.0"),
        (
            "all parts are the first",
            "checkpoint(self._decode, part, use_reentrant=False)",
            "checkpoint(self._decode, parts[0], use_reentrant=False)",
        ),
        (
            "a decoder under autocast",
            "        return self.pipe.vae.decode(",
            "        with self.autocast(): return self.pipe.vae.decode(",
        ),
        ("a decoder checkpointed twice", "not checkpoints_itself", "not None"),
        ("autocast keeps weights", "cache_enabled=False", "cache_enabled=True"),
        ("pictures decoded all at once", "max(1, 2**20 // math.prod(self.resolution))", "max(1, 2**20)"),
        (
            "students start rounded",
            "folder, name, torch.float32, variant)",
            "folder, name, self.dtype, variant)",
        ),
        (
            "SDXL's output is not float32",
            "added_cond_kwargs=added, return_dict=False)[0].float()",
            "added_cond_kwargs=added, return_dict=False)[0]",
        ),
        (
            "SDXL cuts no prompt",
            'padding="max_length", truncation=True, return_tensors="pt")\n            out',
            'padding="max_length", return_tensors="pt")\n            out',
        ),
        ("a damaged start is taken", 'found = find_start(args, "student")', "found = find_start(args)"),
        ("times that repeat", "if len(set(self.times)) < steps:", "if False:"),
        # the schedule
        ("data at t = 1", "[torch.ones(1, dtype=torch.float64), abar]", "[abar[:1], abar]"),
        (
            "abar in steps",
            "self.alphas_cumprod[below + 1], t - below)",
            "self.alphas_cumprod[below + 1], (t - below).round())",
        ),
        (
            "abar a step late",
            "torch.lerp(self.alphas_cumprod[below], self.alphas_cumprod[below + 1],",
            "torch.lerp(self.alphas_cumprod[below - 1], self.alphas_cumprod[below],",
        ),
        (
            "alpha and sigma swapped",
            "return abar.sqrt(), (1 - abar).sqrt()",
            "return (1 - abar).sqrt(), abar.sqrt()",
        ),
        ("alpha = abar", "return abar.sqrt(), (1 - abar).sqrt()", "return abar, (1 - abar).sqrt()"),
        ("timestep off by one", "return (t - 1).clamp(min=0)", "return t.clamp(max=999)"),
        ("timestep in whole numbers", "return (t - 1).clamp(min=0)", "return (t - 1).clamp(min=0).floor()"),
        ("noise subtracted", "return alpha * x_0 + sigma * eps", "return alpha * x_0 - sigma * eps"),
        # predictions
        ("flow's target the wrong way round", "return eps - x_0", "return x_0 - eps"),
        ("v's target added", "return alpha * eps - sigma * x_0", "return alpha * eps + sigma * x_0"),
        ("v's target flipped", "return alpha * eps - sigma * x_0", "return sigma * x_0 - alpha * eps"),
        (
            "x0_hat of noise not divided",
            "return (x_t - sigma * raw) / alpha, raw",
            "return (x_t - sigma * raw), raw",
        ),
        (
            "x0_hat of noise added",
            "return (x_t - sigma * raw) / alpha, raw",
            "return (x_t + sigma * raw) / alpha, raw",
        ),
        (
            "flow's x0_hat added",
            "return x_t - sigma * raw, x_t + alpha * raw",
            "return x_t + sigma * raw, x_t + alpha * raw",
        ),
        (
            "flow's eps_hat subtracted",
            "return x_t - sigma * raw, x_t + alpha * raw",
            "return x_t - sigma * raw, x_t - alpha * raw",
        ),
        ("v's x0_hat added", "return alpha * x_t - sigma * raw,", "return alpha * x_t + sigma * raw,"),
        ("v's eps_hat subtracted", "sigma * x_t + alpha * raw\n", "sigma * x_t - alpha * raw\n"),
        ("guidance ignored", "raw_null + scale * (raw - raw_null)", "raw + 0 * scale * (raw - raw_null)"),
        (
            "guidance from the prompt on",
            "raw_null + scale * (raw - raw_null)",
            "raw + scale * (raw - raw_null)",
        ),
        (
            "null before prompt",
            "concatenate(cond, self.null(len(x_t)))",
            "concatenate(self.null(len(x_t)), cond)",
        ),
        (
            "the step's predictions swapped",
            "return self.diffuse(x0_hat, eps_hat, s)",
            "return self.diffuse(eps_hat, x0_hat, s)",
        ),
        # times
        ("a student's first time forgotten", 'first_time or meta.get("first_time")', "first_time"),
        ("a student's first time is T", "steps, self.first_time * T)", "steps)"),
        ("sampler's times off by one", "timestep + 1.0 for", "timestep + 0.0 for"),
        ("student's times not from T", "first - (i * first) // steps", "first - (i + 0.5) * first // steps"),
        ("SD3's student's times", "[first * (1 - i / steps)", "[first * (1 - i / (steps + 1))"),
        # conditions, maps and pixels
        ("guidance of 0 takes the prompt away", "if scale <= 1:", "if scale == 1:"),
        ("an empty negative prompt is none", "and self.null_prompt is None", "and not self.null_prompt"),
        (
            "the null prompt is a word",
            'null = self.encode([self.null_prompt or ""])',
            'null = self.encode(["a"])',
        ),
        (
            "the null prompt is a word in SD3",
            "return self.encode([self.null_prompt])",
            'return self.encode(["a"])',
        ),
        (
            "SDXL's null prompt not zero",
            "if self.pipe.config.force_zeros",
            "if not self.pipe.config.force_zeros",
        ),
        (
            "the backbone is told t",
            "read_taps(self.taps, lambda: self.raw(self.denoiser, x_t,",
            "read_taps(self.taps, lambda: self.call(self.denoiser, x_t,",
        ),
        (
            "maps transposed",
            "math.prod(self.patches)].transpose(1, 2).unflatten(2, self.patches)",
            "math.prod(self.patches)].transpose(1, 2).unflatten(2, self.patches).mT",
        ),
        (
            "SD3's maps are the text",
            "self.block_taps(self.denoiser.transformer_blocks, 1)",
            "self.block_taps(self.denoiser.transformer_blocks, 0)",
        ),
        # families
        ("SDXL's last hidden state", "out.hidden_states[-2]", "out.hidden_states[-1]"),
        ("SDXL's encoders swapped", "torch.cat(embeds, dim=-1)", "torch.cat(embeds[::-1], dim=-1)"),
        (
            "SDXL's crop for its size",
            "[height, width, 0, 0, height, width]",
            "[0, 0, height, width, height, width]",
        ),
        (
            "SDXL's width before its height",
            "[height, width, 0, 0, height, width]",
            "[width, height, 0, 0, width, height]",
        ),
        (
            "SDXL's pooled text of another row",
            '"text_embeds": out.text_embeds.to',
            '"text_embeds": out.text_embeds.roll(1, 0).to',
        ),
        (
            "SD3's shift",
            "self.shift * u / (1 + (self.shift - 1) * u)",
            "self.shift * u / (1 + self.shift * u)",
        ),
        ("SD3's shift ignored", "self.shift * u / (1 + (self.shift - 1) * u)", "u"),
        ("SD3's alpha and sigma swapped", "return 1 - sigma, sigma", "return sigma, 1 - sigma"),
        ("SD3 is told t", "return T * self.schedule(t.double())[1]", "return t"),
        (
            "SD3's pooled text of another row",
            '"pooled_projections": pooled}',
            '"pooled_projections": pooled.roll(1, 0)}',
        ),
        ("CogVideoX without positions", "image_rotary_emb=self.rotary,", "image_rotary_emb=None,"),
        (
            "CogVideoX's frames backwards",
            "x = self.pack(x).to(self.dtype)",
            "x = self.pack(x).flip(1).to(self.dtype)",
        ),
        (
            "CogVideoX's output backwards",
            "return self.unpack(raw).float()",
            "return self.unpack(raw).flip(2).float()",
        ),
        # students
        ("the straight path backwards", "return (1 - r) * x_0 + r * eps", "return r * x_0 + (1 - r) * eps"),
        (
            "a velocity added",
            "return x_t - self.ratio(t, x_t) * self.velocity",
            "return x_t + self.ratio(t, x_t) * self.velocity",
        ),
        (
            "the velocity's timestep off by one",
            "return self.teacher.call(net, x_t, t, self.teacher.tell",
            "return self.teacher.raw(net, x_t, t, self.teacher.tell",
        ),
        ("simulation a step short", "for i in range(k):", "for i in range(k - 1):"),
        (
            "simulation's noise reused",
            "self.diffuse(x0_hat, rng.normal(*self.teacher.latent_shape),",
            "self.diffuse(x0_hat, x,",
        ),
        ("simulation noises to the time before", "self.time(i + 1, x))", "self.time(i, x))"),
        (
            "simulation without renoising",
            "x = self.diffuse(x0_hat, rng",
            "x = x0_hat if k else self.diffuse(x0_hat, rng",
        ),
        ("the last step at T", "self.denoise(net, x, self.steps - 1, cond)", "self.denoise(net, x, 0, cond)"),
        (
            "the last step left out",
            "x = self.simulate(net, rng, cond, self.steps - 1)",
            "x = self.simulate(net, rng, cond, max(0, self.steps - 2))",
        ),
        # discriminators
        ("heads pool the largest", "self.body(x).flatten(2).mean(2)", "self.body(x).flatten(2).amax(2)"),
        ("heads pool the sum", "self.body(x).flatten(2).mean(2)", "self.body(x).flatten(2).sum(2)"),
        ("heads with a bias", "nn.Linear(width, 1, bias=False)", "nn.Linear(width, 1)"),
        ("a halving more", "math.log2(min(shape[-2:]))) - 2", "math.log2(min(shape[-2:]))) - 1"),
        ("strides over the frames", "(1, 4, 4), (1, 2, 2), (0, 1, 1)", "(3, 4, 4), (2, 2, 2), (1, 1, 1)"),
        (
            "every map to the last head",
            "head(m) for head, m in zip(self.heads, maps)]",
            "self.heads[0 if m.shape == maps[0].shape else -1](m) for head, m in zip(self.heads, maps)]",
        ),
        ("hinge of real flipped", "weigh(F.relu(1 - real), weights)", "weigh(F.relu(1 + real), weights)"),
        ("hinge of fake flipped", "weigh(F.relu(1 + fake), weights)", "weigh(F.relu(1 - fake), weights)"),
        ("hinge of real without its 1", "weigh(F.relu(1 - real), weights)", "weigh(F.relu(-real), weights)"),
        (
            "hinge of fake with a half",
            "weigh(F.relu(1 + fake), weights)",
            "weigh(F.relu(0.5 + fake), weights)",
        ),
        ("no hinge", "weigh(F.relu(1 + fake), weights)", "weigh(1 + fake, weights)"),
        ("G's hinge flipped", "return -weigh(fake, weights)", "return weigh(fake, weights)"),
        ("weighted mean for the sum", "(values * weights).sum(1).mean()", "(values * weights).mean()"),
    ],
    "teachers/flux.py": [
        ("FLUX told T sigma", "timestep.to(self.dtype) / T", "timestep.to(self.dtype)"),
        ("FLUX's times rounded once", "timestep.to(self.dtype) / T", "timestep.float() / T"),
        ("FLUX's rows and columns swapped", "rows[:1]), rows, columns)", "rows[:1]), columns, rows)"),
        (
            "FLUX's teacher told the student's guidance",
            "self.tell_guidance(cond, scale))",
            "self.tell_guidance(cond, self.student_guidance))",
        ),
        ("FLUX's one pass counted as two", "return 1", "return 2"),
        ("FLUX's taps on text", "*net.single_transformer_blocks], 1)", "*net.single_transformer_blocks], 0)"),
    ],
    "teachers/packed.py": [
        ("tokens unfolded on their side", "unflatten(2, self.patches)", "unflatten(2, self.patches[::-1])"),
    ],
    "teachers/qwen_image.py": [
        ("Qwen told T sigma", "timestep.to(self.dtype) / T", "timestep.to(self.dtype)"),
        ("Qwen's levels not stretched", "alpha * (1 - end) / alpha[-1]", "alpha * (1 - end)"),
        ("Qwen's norm of the null pass", "self.pack(raw).norm", "self.pack(raw_null).norm"),
        ("Qwen's norm of the whole picture", "pack(raw).norm(dim=-1,", "pack(raw).norm(dim=(-2, -1),"),
        ("Qwen's null prompt empty", 'null_prompt = " "', 'null_prompt = ""'),
    ],
    "teachers/stable_diffusion.py": [
        ("SD's times rounded", "timestep.float()", "timestep.to(self.dtype)"),
        ("zeros as Stable Diffusion's null", "_null = Teacher._null", "_null = SDXL._null"),
    ],
    "teachers/wan.py": [
        ("Wan's times down to 0", "i * (T - 1) / steps", "i * T / steps"),
        ("Wan's text as long as encode_prompt has it", "=self.text_length,", "=226,"),
        ("Wan 5B as slow as Wan 2.1", "self.fps = 24", "self.fps = 16"),
        ("Wan 5B as short as Wan 2.1", "own_frames = 121", "own_frames = 81"),
    ],
    "teachers/z_image.py": [
        ("Z-Image's times rounded", "timestep.float()", "timestep.to(self.dtype)"),
        ("Z-Image guided less", "    guidance = 6.0", "    guidance = 5.0"),
        ("Z-Image told sigma", "images, 1 - timestep.float() / T", "images, timestep.float() / T"),
        ("Z-Image's sign", "return -torch.stack(raw)", "return torch.stack(raw)"),
        ("Z-Image's guidance counted from 1", '"guidance_scale": scale - 1', '"guidance_scale": scale'),
    ],
    "support/checkpoints.py": [
        ("LoRA's checkpoints stay", 'LORA_FILE, "scheduler"}', "LORA_FILE}"),
        ("every rank reads all", "local_world_size() if together else 1", "1"),
        ("a rank hears no other", "damaged = add_up(damaged)", "damaged = damaged"),
        ("one average of AdamW", "weights += 2 * list_parameters(part)", "weights += list_parameters(part)"),
        ("a batch of one rank", ' * meta.get("processes", 1)', ""),
        (
            "a fingerprint of any schedule",
            "configs = [list_settings(net), list_settings(scheduler)]",
            "configs = [list_settings(net)]",
        ),
        ("an adapter's checksum is not compared", '("student/", LORA_FILE)', '("student/", "student")'),
        ("the optimisers' settings are the checkpoint's", "group.update(own)", "group.update({})"),
        ("a fingerprint of default settings, too", "if value != default:", "if True:"),
        (
            "a fingerprint of some weights alone",
            "sample_bits(net.parameters())",
            "sample_bits([*net.parameters()][::99])",
        ),
    ],
    "support/loading.py": [
        ("pipelines tell of long texts", "setLevel(logging.ERROR)", "setLevel(logging.WARNING)"),
        ("Wan's float32 parts in bf16", " and name not in kept", ""),
    ],
    "metrics/images.py": [
        ("half a batch is drawn", "return all(os.path.exists(row[k])", "return any(os.path.exists(row[k])"),
        ("pictures from the seed 0", "numbers, [seeds[k]])", "numbers, [k])"),
        ("a picture that is not written is not missed", "job.result()", "pass"),
        ("scores of other weights", "digest.update(sample_bits(scorer.list_weights()))", "pass"),
        (
            "scored with the first prompts",
            "prompts[first : first + chunk]), path)",
            "prompts[:chunk]), path)",
        ),
        (
            "every video is the first",
            "save_video(self.read_pixels(p, k), path, self.fps)",
            "save_video(self.read_pixels(p), path, self.fps)",
        ),
        (
            "every frame is the first",
            "tops = [i * height for i in range(self.frames)]",
            "tops = [0 for i in range(self.frames)]",
        ),
        ("ranks that found two checkpoints", "self.check()  # the main", "pass  # the main"),
        ("no system comes to the device", "self.system.on_device(), Thread", "Thread"),
    ],
    "metrics/systems.py": [
        (
            "pictures known by their names alone",
            "stamps = [[file, os.path.getsize(path), os.path.getmtime(path)] for",
            "stamps = [[file] for",
        ),
    ],
    "metrics/clip.py": [
        ("CLIP's prefix not in its description", ", prefix {args.clip_prefix!r}", ""),
        ("CLIP's activation", 'force_quick_gelu=tag.get("quick_gelu", False)', "force_quick_gelu=False"),
    ],
    "metrics/lpips.py": [
        (
            "LPIPS's size not in its description",
            'f"{args.lpips_net}, {self.size} pixels, in [-1, 1]"',
            'f"{args.lpips_net}, in [-1, 1]"',
        ),
    ],
    "metrics/page.py": [
        ("a page of the first prompt", '"a": embed(a, p)', '"a": embed(a, 0)'),
        ("a page of one system", '"b": embed(b, p)', '"b": embed(a, p)'),
    ],
    "metrics/plots.py": [
        (
            "a grid of the first prompt",
            "images.read_pixels(p, size=size) for p",
            "images.read_pixels(0, size=size) for p",
        ),
        ("a sheet of the first prompt", "images.read_frames(p)[0]", "images.read_frames(0)[0]"),
        (
            "a grid of one system",
            "torch.stack([images.read_pixels(p, size=size) for p",
            "torch.stack([first.read_pixels(p, size=size) for p",
        ),
        (
            "the reference minus a system",
            "values[system][name] - values[reference][name])",
            "values[reference][name] - values[system][name])",
        ),
        ("the worst are the best", "np.argsort(-values, kind", "np.argsort(values, kind"),
    ],
    "metrics/rows.py": [
        (
            "the reference's distance to itself",
            "if isinstance(value, np.ndarray) and not is_own:",
            "if isinstance(value, np.ndarray):",
        ),
        ("scores that are no numbers", "if len(bad):", "if len(bad) == len(column):"),
        (
            "an interval of nothing",
            "bootstrap_interval(value[np.isfinite(value)]) if",
            "bootstrap_interval(value) if",
        ),
    ],
    "evaluate.py": [
        (
            "FID to the first system",
            'if metric == "fid" or args.reference in systems',
            "if args.reference in systems",
        ),
        (
            "seeds from 0",
            "    seeds = range(args.seed, args.seed + args.seeds)\n    seconds",
            "    seeds = range(args.seeds)\n    seconds",
        ),
        (
            "the reference is the first",
            'name = args.reference if metric == "fid" or args.reference in systems else args.names[0]',
            "name = args.names[0] if args.reference in systems else args.reference",
        ),
    ],
    "sample.py": [
        ("the first prompts again", "some = [prompts[i] for i in numbers]", "some = prompts[: len(numbers)]"),
        ("one seed for all", "numbers, [seed])[:, 0]", "numbers, args.seeds[:1])[:, 0]"),
        ("systems side by side in turn", "torch.cat(drawn, dim=-1)", "torch.cat(drawn[::-1], dim=-1)"),
        (
            "noise repeats in every batch",
            "system.images(some, numbers, [seed])[:, 0]",
            "system.images(some, range(len(some)), [seed])[:, 0]",
        ),
        (
            "sample.py's --prompt-column forgotten",
            "read_prompts(args.prompts, args.prompt_column) if",
            "read_prompts(args.prompts) if",
        ),
        ("an export with all parts on the GPU", "args.offload = True", "pass"),
        ("--fps forgotten", 'f"{path}.mp4", args.fps or teacher.fps)', 'f"{path}.mp4", teacher.fps)'),
    ],
    "support/offload.py": [
        (
            "conditions are never forgotten",
            "self.conditions = {}\n        self.remember(prompts)",
            "pass\n        self.remember(prompts)",
        ),
        ("a denoiser that stays", 'net.to("cpu")', "pass"),
        ("conditions of all batches", "self.conditions = {}\n        return", "pass\n        return"),
        ("no video in tiles", "> LARGE:", "> 9 * LARGE:"),
        ("every video in tiles", "> LARGE:", "> 0:"),
    ],
    "support/systems.py": [
        (
            "no guidance is the default",
            "teacher.guidance if guidance is None else guidance",
            "guidance or teacher.guidance",
        ),
    ],
    "support/pairs.py": [
        ("nobody reads all pairs", "thorough=k % world_size() == rank())", "thorough=False)"),
        ("pairs of any size", "if tuple(shape) != teacher.latent_shape:", "if False:"),
    ],
    "support/parallel.py": [
        (
            "Wan's tables in bf16",
            "param_dtype_override_fn=lambda p: p.dtype if p in kept else None,",
            "",
        ),
        ("an alarm for FLUX's blocks", 'warnings.filterwarnings("ignore", r"FSDP2', 'str(r"FSDP2'),
        ("nodes exchange each micro-batch", "set_requires_all_reduce(now)", "set_requires_all_reduce(True)"),
        ("srun's ranks on one GPU", "rank() % torch.cuda.device_count())", "0)"),
        ("a shard told 1000 for 999", "cast_forward_inputs=False", "cast_forward_inputs=True"),
        ("gradients added up in bf16", "reduce_dtype=torch.float32", "reduce_dtype=dtype"),
        ("a GPU by the rank of all nodes", 'read_number("LOCAL_RANK"', 'read_number("RANK"'),
        ("ranks that differ agree", "unique()) == 1", "unique()) > 0"),
        ("weights of one seed", "torch.manual_seed(seed)", "torch.manual_seed(0)"),
        ("gradients beside DDP's buckets", "p.grad = torch.zeros_like(p)", "p.grad = None"),
        ("the first node leaves", "store.wait([all_done], datetime.timedelta(days=30))", "pass"),
        ("nodes that share everything", 'lay_out_nodes() if args.shard == "hsdp" else None', "None"),
        ("one node waits for others", 'read_number("LOCAL_WORLD_SIZE", world_size())', "0"),
    ],
    "tools/trace.py": [
        ("all steps before t'", "(self.steps - 1) / 2 * self", "(self.steps - 1) * self"),
        ("operations of one update", "ttur=updates)", "ttur=1)"),
    ],
    "tools/plan.py": [
        ("a smaller global batch", "args.accumulate * args.batch // batch", "args.batch // batch"),
        ("adapters of square layers", "layer.in_features + layer.out_features", "2 * layer.in_features"),
        ("hours of minutes", "args.iterations / 3600", "args.iterations / 60"),
        (
            "an average of an eighth",
            'rows["EMA of the student"] = (average, 0, 0)',
            'rows["EMA of the student"] = (average / 8, 0, 0)',
        ),
    ],
    "support/errors.py": [
        ("cuBLAS's errors as the teacher's", ' or str(error).startswith("CUDA error")', ""),
        ("a GPU's errors as the teacher's", "torch.AcceleratorError, dist", "dist"),
        ("NCCL's errors as the teacher's", ", dist.DistError)", ")"),
        ("a rank as large as the world", "int(given[0]) < int(given[1])", "int(given[0]) <= int(given[1])"),
        (
            "a note to a dead terminal ends a run",
            "with contextlib.suppress(OSError):  # the",
            "if True:  # the",
        ),
    ],
    "support/files.py": [
        ("a full quota is a defect", "(errno.ENOSPC, errno.EDQUOT, errno.EFBIG)", "(errno.ENOSPC,)"),
        (
            "what cannot be read is damaged",
            "except (FileNotFoundError, NotADirectoryError,",
            "except (OSError,",
        ),
    ],
    "support/outputs.py": [
        ("results within a pipeline", 'os.path.exists(f"{place}/model_index.json")', "False"),
    ],
    "support/inputs.py": [
        ("a node without the run", "    check_that_nodes_share(args.out, own is not None)", "    pass"),
        ("an adapter of any rank goes on", "if args.lora and kind !=", "if not args.lora and kind !="),
        ("ranks start from what each finds", 'if not agree(meta["step"]):', "if False:"),
        ("a run that goes on wants --init", "= own or find", "= find"),
        ("a scorer's package is looked for late", "check_packages(args.eval_metric)", "pass"),
        ("peft is looked for late", "if args.lora:", "if False:"),
    ],
    "support/run.py": [
        ("a signal while scoring is not heard", "is_late = self._agree() or is_late", "is_late = is_late"),
        (
            "a run of another length",
            '"resolution", "frames", "parametrisation"',
            '"resolution", "parametrisation"',
        ),
        (
            "a user's folder goes",
            "if os.path.isdir(folder) and is_ours(folder):",
            "if os.path.isdir(folder):",
        ),
        ("Ctrl-C as a success", "if self.leaving and self.signal == signal.SIGINT:", "if False:"),
        ("no checkpoint by the clock", 'return share["late"] > 0', "return False"),
        ("minutes of a second", ">= 60 * self.args.save_minutes", ">= self.args.save_minutes"),
        ("encoders that come for each batch", "if teacher.offload:", "if False:"),
        (
            "bad updates of any time add up",
            "self.streak + 1 if bad else 0",
            "self.streak + 1 if bad else self.streak",
        ),
        ("other LoRA targets go on", '"lora", "lora_targets", "head_width")', '"lora", "head_width")'),
        (
            "another resolution goes on",
            'IDENTITY = ("stage", "fingerprint", "resolution", "frames",',
            'IDENTITY = ("stage", "fingerprint", "frames",',
        ),
        (
            "the last student is not scored",
            "return step == self.args.iterations or step % self.args.eval_every == 0",
            "return step % self.args.eval_every == 0",
        ),
        ("seconds of all iterations", "(now - self.clock) / (step - self.logged)", "now - self.clock"),
        (
            "what was left out counts for ever",
            "self._show(shown)\n        self.left_out = 0",
            "self._show(shown)\n        pass",
        ),
        ("a checkpoint in half an hour", "set_patience(PATIENCE, self.args)", "pass"),
        (
            "a second checkpoint for a signal",
            "self._agree()  # a signal meanwhile",
            "pass  # a signal meanwhile",
        ),
        (
            "a rank alone saves the best",
            'average({"best": float(score > self.best)})["best"] == 1',
            "score > self.best",
        ),
        (
            "a checkpoint that stays ends the run",
            "except OSError as error:  # of NFS",
            "except KeyError as error:  # of NFS",
        ),
        ("previews of one sample again and again", "range(first, first + len(some))", "range(len(some))"),
        ("what is damaged is kept in a whole one's place", "if problem is None:", "if True:"),
        ("a bar that nobody reads ends a run", "self.bar.disable = True", "raise"),
        ("what was passed over counts", "folders[folders.index(newest) :]", "folders"),
        ("prompts encoded in other groups", "first = step - step % self.ahead", "first = step"),
        ("as many iterations ahead at any batch", "AHEAD // (args.batch * args.accumulate", "AHEAD // (1"),
        ("nohup's SIGHUP ends a run", "if signal.getsignal(number) != signal.SIG_IGN:", "if True:"),
    ],
    "support/backbones.py": [
        (
            "pixels of [0, 1] to SAM",
            "x = ((pixels + 1) / 2 - self.mean) / self.std",
            "x = (pixels - self.mean) / self.std",
        ),
        ("SAM's mean", "MEAN = (0.485, 0.456, 0.406)", "MEAN = (0.5, 0.5, 0.5)"),
        ("SAM's deviation", "STD = (0.229, 0.224, 0.225)", "STD = (0.225, 0.224, 0.229)"),
        ("SAM's local blocks", "block.window_size == 0", "block.window_size != 0"),
        ("DINOv2's class token for a patch", "tokens[:, -count:]", "tokens[:, :count]"),
    ],
    "support/taps.py": [
        ("four first layers", "max(0, len(layers) * i // 4 - 1)", "i - 1"),
        ("maps that wait in float32", "maps.append(read(output))", "maps.append(read(output).float())"),
    ],
    "support/rng.py": [
        ("rows alike", "generator(*key, row) for row in rows", "generator(*key) for row in rows"),
        ("uniform to a half", "numbers.append(torch.rand(", "numbers.append(0.5 * torch.rand("),
        ("uniform for normal", "torch.randn(shape, generator=g)", "torch.rand(shape, generator=g)"),
        (
            "the last prompt never",
            "torch.randint(high, (1,), generator=g)",
            "torch.randint(max(1, high - 1), (1,), generator=g)",
        ),
        (
            "the last time never",
            "torch.randint(high, (1,), generator=generator(*key))",
            "torch.randint(max(1, high - 1), (1,), generator=generator(*key))",
        ),
        ("streams without their use", "(len(use), *use.encode(), *key)", "(len(use), *key)"),
        ("rows keyed without the seed", "(use, args.seed, *key)", "(use, *key)"),
        ("rows keyed without the iteration", "(use, args.seed, *key)", "(use, args.seed)"),
        ("micro-batches alike", "(part * world_size() + rank()) * args.batch", "rank() * args.batch"),
        ("ranks alike", "(part * world_size() + rank()) * args.batch", "part * world_size() * args.batch"),
        (
            "micro-batches overlap",
            "(part * world_size() + rank()) * args.batch",
            "(part + rank()) * args.batch",
        ),
    ],
    "support/training.py": [
        (
            "a student told its teacher's guidance",
            'default = getattr(args, "guidance", family.guidance)',
            "default = family.guidance",
        ),
        (
            "no ZeRO beside fsdp",
            'shares_states = args.shard != "ddp"',
            'shares_states = args.shard == "zero1"',
        ),
        ("memory in GiB", "ru_maxrss / 2**10", "ru_maxrss / 2**20"),
        (
            "DDP's gradients are made anew",
            "set_to_none=not is_in_ddp(net)",
            "set_to_none=True",
        ),
        ("what --offload leaves is moved, too", "if name not in waiting:", "if True:"),
        ("the micro-batches are summed", "loss_of(b) / len(batch)", "loss_of(b)"),
        ("the last micro-batch alone", "loss.backward()", "optimizer.zero_grad() or loss.backward()"),
        ("the clip ignored", "= clip_gradient(optimizer, clip)", "= clip_gradient(optimizer, 1e9)"),
        ("a step by what is not finite", "if norm.isfinite():", "if True:"),
        ("gradients are kept", "optimizer.zero_grad(", "dict("),
        (
            "ADM with the sampler's guidance",
            "args.guidance = family.adm_guidance",
            "args.guidance = family.guidance",
        ),
        (
            "a student that goes on is told another guidance",
            'meta["arguments"].get("student_guidance")',
            "None",
        ),
        ("the average's decay is the checkpoint's", '{**state, "decay": self.average.decay}', "state"),
        ("AdamW's betas", '"betas": args.betas', '"betas": (0.5, 0.9)'),
        ("AdamW's weight decay", '"weight_decay": args.weight_decay', '"weight_decay": 0'),
        (
            "a decay a step early",
            "(args.iterations - step) / decaying",
            "(args.iterations - step - 1) / decaying",
        ),
        ("a decay from the start", "max(1, args.decay * args.iterations)", "max(1, args.iterations)"),
        ("a decay that grows", "rate * factor", "rate / factor"),
        (
            "a clip of another norm",
            "clip_grad_norm_(parameters, clip)",
            "clip_grad_norm_(parameters, 10 * clip)",
        ),
        ("the last value for the mean", "torch.stack(values).mean()", "values[-1]"),
        ("the cosine of the ascent", "F.cosine_similarity(-gradient", "F.cosine_similarity(gradient"),
        ("across without the square", "1 - cosine.square()", "1 - cosine"),
        ("the average's decay inverted", "decay=decay)", "decay=1 - decay)"),
        ("the average is not used", "weight.copy_(average)", "weight.copy_(weight)"),
        ("the average is lost", "average.copy_(kept)", "average.copy_(average)"),
    ],
    "support/schedulers.py": [
        ("LCM's skip", "EXACT = 1e6", "EXACT = 10.0"),
        ("LCM's betas", "1 - alphas_cumprod[1:] / alphas_cumprod[:-1]", "1 - alphas_cumprod[1:]"),
        ("levels of one step more", "d = (1 - end) / (len(sigmas) - 1)", "d = (1 - end) / len(sigmas)"),
        ("levels not stretched", "\n        shift_terminal=sigmas[-1]", "\n        shift_terminal=None"),
        ("levels of the inverse shift", "base_shift=math.log(a)", "base_shift=-math.log(a)"),
        (
            "one step without noise",
            "Scheduler(stochastic_sampling=True)",
            "Scheduler(stochastic_sampling=False)",
        ),
        ("a velocity's first level", "flow_shift=1e30", "flow_shift=1.0"),
        ("a velocity is noise", 'prediction_type="flow_prediction"', 'prediction_type="epsilon"'),
    ],
    "metrics/oracle.py": [
        ("variety of what is named", "[:, 0] < 0", "[:, 0] >= 0"),
        ("variety against uniform alone", "            if reference:", "            if reference == {}:"),
    ],
    "metrics/variety.py": [
        ("chance is not taken off", " - expect_tv_to_uniform(n, samples)", ""),
        ("total variation with chance in it", "expected + walks[differ] / samples", "0 * walks[differ]"),
        ("chance as if no noise were shared", "walks[differ] / samples", "walks[samples // 2] / samples"),
        (
            "a squared distance as if no noise were shared",
            "(samples**2 * (shares * others).sum(1) - paired)",
            "((samples**2 - samples) * (shares * others).sum(1) + 0 * paired)",
        ),
        ("a value seen once is covered", "(shares >= 0.5 / n)", "(shares > 0)"),
        ("the spread over all prompts", "(x.var(1, ddof=1) + y", "(x.var(ddof=1) + y"),
        ("a distance twice as long", "return 0.5 * np.abs(", "return np.abs("),
        ("a square with chance in it", "- 1) / (samples - 1)", "- 0) / (samples - 0)"),
        (
            "both squares of the student",
            "estimate_square(others, samples)",
            "estimate_square(shares, samples)",
        ),
    ],
    "support/tensors.py": [
        ("the mean of all rows", "dims = tuple(range(1, x.ndim))", "dims = tuple(range(x.ndim))"),
        (
            "conditions in another order",
            "torch.cat([c[name] for c in conditions])",
            "torch.cat([c[name] for c in conditions[::-1]])",
        ),
        ("maps keep their graphs", "[m.detach() for m in maps]", "[m for m in maps]"),
    ],
    "support/lora.py": [
        ("adapters train in bf16", "weight.data = weight.data.float()", "weight.data = weight.data"),
        ("LoRA's scale", "lora_alpha=rank", "lora_alpha=2 * rank"),
        ("LoRA's adapter is off", "with self.switch_on([self.name]):", "with self.switch_on([]):"),
        ("LoRA's blocks again without it", "with self.switch_on(names):", "with self.switch_on([]):"),
        ("an adapter of other layers", "if weights.keys() != layers.keys():", "if not layers:"),
        ("LoRA's adapters stay on", "self.backbone.switched_on[:] = before", "self.backbone"),
    ],
    "support/lora_files.py": [
        ("an adapter added in half", '.lora_B.weight"] @ down)', '.lora_B.weight"] @ down / 2)'),
        ("an adapter in the weights' place", "add_(layers[f", "copy_(layers[f"),
        ("a LoRA file's alpha", '"lora_alpha": rank', '"lora_alpha": 2 * rank'),
        (
            "a LoRA file's factors too large",
            "up = left[:, :rank] * root",
            "up = left[:, :rank] * values[:rank]",
        ),
        ("a LoRA file's error of layers alone", "missing += size", "missing += 0"),
    ],
    "support/teacher_lora.py": [
        (
            "a LoRA file that is no part of the fingerprint",
            "[teacher.fingerprint, compute_checksum(path)]",
            "[teacher.fingerprint]",
        ),
        ("a LoRA file left out of what trains", "    if teacher.lora:", "    if not teacher.lora:"),
        (
            "a LoRA file merged twice",
            "pipe, teacher.lora, [teacher.denoiser_name])",
            "pipe, teacher.lora, list_lora_parts(pipe))",
        ),
        ("half a layer of a LoRA file", "sorted(downs.keys() ^ ups.keys())", "()"),
        ("a LoRA file's norms passed over", "in known) and tensor.any():", "in known) and False:"),
        ("a LoRA file's alphas as diffusers reads them", "module.scaling[name] if has_alphas else 1", "1"),
        ("a LoRA file that is merged in part", "TOLERANCE = 1e-3", "TOLERANCE = 10"),
        (
            "a LoRA file's biases passed over",
            '("layers", "magnitudes", "biases")',
            '("layers", "magnitudes")',
        ),
    ],
    "support/export.py": [("an export without switches", "(**parts, **switches)", "(**parts)")],
    "metrics/vbench.py": [
        ("VBench's best scene", '"scene": (0.0, 0.8222, 1)', '"scene": (0.0, 1.0, 1)'),
        ("VBench's dimensions anew", 'if record and record["command"] == command:', "if False:"),
    ],
    "metrics/scorer.py": [
        ("a square from the top", "top = (image.height - side) // 2", "top = 0"),
        ("a square from the left", "left = (image.width - side) // 2", "left = 0"),
    ],
    "metrics/report.py": [
        ("scores of the first images", "round_values(array[i].item())", "round_values(array[p].item())"),
    ],
    "support/prompts.py": [
        ("Parquet's first column", "table.read([chosen]).column(0)", "table.read().column(0)"),
    ],
}

MUTATIONS = []
for path, changes in TABLE.items():
    MUTATIONS += [Mutation(path, *change) for change in changes]


def copy_repository(folder):
    """What git tracks, as it is in the working tree, without its history."""
    listing = subprocess.run(["git", "ls-files", "-z"], cwd=ROOT, capture_output=True, text=True, check=True)
    for path in listing.stdout.split("\0"):
        source = os.path.join(ROOT, path)
        if os.path.isfile(source):
            os.makedirs(os.path.dirname(os.path.join(folder, path)), exist_ok=True)
            shutil.copy(source, os.path.join(folder, path))


def order_tests(mutation):
    """The tests that a mutation is tried on; of the unmutated code, those that most are."""
    tests = OF_THE_PARTS + OF_THE_STAGES + SLOW
    for file, own in OF_FILES.items():
        if mutation and mutation.file.startswith(file):
            tests = own
    return tests


def run_tests(mutation):
    """The tests in a copy with this mutation, or None for none -> the test that failed; None if none did."""
    with tempfile.TemporaryDirectory() as folder:
        copy_repository(folder)
        if mutation:
            path = os.path.join(folder, mutation.file)
            with open(path, encoding="utf-8") as file:
                text = mutation.change(file.read())
            with open(path, "w", encoding="utf-8") as file:
                file.write(text)
        command = [sys.executable, "-m", "pytest", "-x", "-q", "--tb=no", "-rfE", "-p", "no:cacheprovider"]
        command += [f"--basetemp={folder}/tmp", *order_tests(mutation)]
        pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT, "text": True}
        result = subprocess.run(command, cwd=folder, timeout=PATIENCE, **pipes)
    if result.returncode == 0:
        return None
    failures = [line for line in result.stdout.splitlines() if line.startswith(("FAILED ", "ERROR "))]
    if result.returncode != 1 or not failures:
        raise RuntimeError(f"{mutation}: the tests did not run\n{result.stdout}")
    return failures[0].split(" - ")[0].split(" ", 1)[1]


def judge(mutation, test):
    """Mutation and the test that failed or None -> what the table says of it."""
    if test:
        return f"caught by {test}"
    if mutation.name in EQUAL:
        return f"equal: {EQUAL[mutation.name]}"
    return "SURVIVED"


def main():
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--only", default="", help="those with this in their names")
    parser.add_argument("--jobs", type=int, default=os.cpu_count(), help="at a time; default one a core")
    args = parser.parse_args()
    chosen = [mutation for mutation in MUTATIONS if args.only in mutation.name]
    start = time.time()
    verdicts = []
    with ThreadPoolExecutor(args.jobs) as pool:
        unchanged = pool.submit(run_tests, None)
        for mutation, test in zip(chosen, pool.map(run_tests, chosen)):
            verdicts.append(judge(mutation, test))
            print(f"{mutation.file:22} {mutation.name:42} {verdicts[-1]}", flush=True)
    if unchanged.result():
        raise RuntimeError(f"the tests fail without a change: {unchanged.result()}")
    survivors = verdicts.count("SURVIVED")
    equal = sum(verdict.startswith("equal") for verdict in verdicts)
    caught = len(chosen) - survivors - equal
    print(f"{len(chosen)} mutations: {caught} caught, {equal} equal, {survivors} survived")
    print(f"{(time.time() - start) / 60:.0f} minutes")
    return 1 if survivors else 0


if __name__ == "__main__":
    sys.exit(main())
