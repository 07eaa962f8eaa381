"""Trains the classes ADP and ADM on a Gaussian mixture, whose scores and mode masses are known exactly.

    python tiny/mixture.py --iterations 4000                        # docs/mixture.md, half an hour of a core
    python tiny/mixture.py --dim 2 64 --starts bad --losses adm plain dmd --dt 1/64 1/4 --weight 0.01 0.25
    python tiny/mixture.py --quick                                                  # a trial of half a minute

Nine modes of unequal weights and widths lie in a plane, one of them far away. In more dimensions the plane
is turned at random, and what is added across it is normal. F_phi is the closed form; G_theta, f_psi and D's
backbone are small networks that were fitted to it. What trains is adp.ADP and adm.ADM, by adp.iterate and
adm.iterate and their own losses: this file gives them a teacher, pairs and random numbers.

All seeds train at once, in networks of as many members (tiny/members.py). What is logged of a discriminator
is therefore a mean over the seeds.

Writes report.json, table.md, figure.png, curves.png and animation.gif to --out.
"""

import copy
import datetime
import os
import shlex
import statistics
import sys
import time

import torch
import torch.nn.functional as F

sys.path.insert(0, os.path.dirname(os.path.dirname(os.path.abspath(__file__))))
import adm
import adp
import common
from common import T
from metrics.report import read_commit
from metrics.rows import format_markdown
from support.arguments import (
    Parser,
    new_folder,
    number,
    parse_adm_arguments,
    parse_adp_arguments,
    positive,
    seed_number,
)
from support.errors import UserError, launch
from support.files import make_folder, read_json, write_json, write_text
from support.rng import RowRNG, generator
from support.training import set_lr
from tiny.gaussians import LIGHT, MODES, Mixture, measure_variation
from tiny.members import Heads, Network, join
from tiny.mixture_plots import save_animation, save_curves, save_figure
from tools.processes import describe_machine
from tools.tables import format_cell

# A loss: the words of adm.py's command line that choose it. Another one is another line.
LOSSES = {
    "adm": "--dt {dt} --r1 {weight} --r2 {weight}",
    "projected": "--dt {dt} --r1 {weight} --r2 {weight} --project",
    "secant": "--dt {dt} --r1 0 --r2 0 --loss secant",
    "penalised secant": "--dt {dt} --r1 {weight} --r2 {weight} --loss secant",
    "line": "--dt {dt} --loss line",
    "unit line": "--dt {dt} --loss unit-line",
    "flat line": "--dt {dt} --loss flat-line",
    "plain": "--dt {dt} --r1 0 --r2 0",
    "dmd": "--loss dmd",
    "adm / alpha": "--dt {dt} --r1 {weight} --r2 {weight}",
    "dmd * alpha": "--loss dmd",
}
# ADM's gradient comes to x0_hat through x_t = alpha_t x0_hat + sigma_t eps, and so has the factor alpha_t,
# which the DMD loss's has not. The last two losses take it from the one and give it to the other: the
# gradient of x0_hat is multiplied by this power of alpha_t.
POWERS = {"adm / alpha": -1, "dmd * alpha": 1}
DRAWN = ("adm", "projected", "plain", "dmd", *POWERS)  # in docs/mixture.md's figure
STARTS = ("good", "bad", "collapsed")
KEPT = (0, 1, 2)  # the modes of the collapsed start
PAIRS = 4096
BATCH = 128
WORDS = "--teacher mixture --head-width 32 --betas 0 0.99 --weight-decay 0 --clip 1e6 --decay 0.5"
ADP_WORDS = "--lambda-pixel 0 --mse 1 --warmup-lr 2e-3 --lr 3e-4 --head-lr 1e-3 --ema 0.99"
ADM_WORDS = "--guidance 1 --steps 1 --warmup 50 --lr 3e-4 --fake-lr 1e-3 --head-lr 2e-3 --ema 0.99"
SAMPLES = 20000  # that a student is judged by
WATCHED = 4000  # by which it is judged while it trains
SHOWN = 400  # of them in a panel
FRAMES = 30  # of the animation, after its first
SLOPES = ("slope_0", "slope_1", "slope_2", "slope_3")  # logged of --loss secant


# ----------------------------------------------------------------------------------------------------------
# What the stages are given: a teacher, pairs, random numbers
# ----------------------------------------------------------------------------------------------------------


class MixtureTeacher(common.Teacher):
    """F_phi is the closed form, of flow matching: x_t = (1 - t/T) x_0 + (t/T) eps. f_psi starts from
    `network`, and D sees its hidden layers; G_theta starts from `start`."""

    device = torch.device("cpu")
    dtype = torch.float32
    prediction = "flow"

    def __init__(self, mixture, network, start=None):
        self.mixture = mixture
        self.denoiser = network
        self.start = start or network
        self.latent_shape = (mixture.dim,)
        self.taps = [(block, join) for block in network.blocks]

    def schedule(self, t):
        return 1 - t / T, t / T

    def timestep(self, t):
        return t

    def times(self, steps):
        return [*self.student_times(steps), 0.0]

    def encode(self, prompts):
        return {}

    def call(self, net, x, timestep, cond):
        return net(x, timestep)

    def guided(self, x_t, t, cond, scale):
        """(x0_hat, eps_hat) of the closed form. There are no prompts, and so no guidance."""
        alpha, sigma = self.alpha_sigma(t, x_t)
        return self.mixture.denoise(x_t, alpha, sigma)

    def trainable(self, args, adapter, folder=None):
        net = self.start if adapter == "student" else self.denoiser
        return copy.deepcopy(net).requires_grad_(True)

    @torch.no_grad()
    def make_heads(self, width, backbone=None):
        members = self.denoiser.members
        layers = self.features(torch.zeros(members, *self.latent_shape), torch.zeros(members), {})
        return Heads(members, layers, width)


class Pairs:
    """Noise and what the teacher makes of it, x_T and x_0 [n, dim], as support.pairs.Pairs gives them."""

    def __init__(self, x_T, x_0):
        self.x_T = x_T
        self.x_0 = x_0

    def __len__(self):
        return len(self.x_T)

    def prompts(self, numbers):
        return [""] * len(numbers)

    def batch(self, numbers):
        return self.x_T[numbers], self.x_0[numbers]


class BatchRNG(RowRNG):
    """Random numbers of a whole batch from one generator. RowRNG has one a row, for ranks that share a batch:
    that would take most of the time here."""

    def __init__(self, n, *key):
        self.n = n
        self.random = generator(*key)

    def normal(self, *shape):
        return torch.randn(self.n, *shape, generator=self.random)

    def uniform(self):
        return torch.rand(self.n, dtype=torch.float64, generator=self.random)

    def integers(self, high):
        return torch.randint(high, (self.n,), generator=self.random).tolist()


class MixtureADP(adp.ADP):
    def draw(self, step, update=0):
        rng = BatchRNG(self.args.batch, "mixture adp", self.args.seed, step)
        numbers = rng.integers(len(self.pairs))
        return [adp.MicroBatch(rng, numbers, self.pairs.prompts(numbers))]


class MixtureADM(adm.ADM):
    losses = {**adm.ADM.losses, "unit-line": "unit_line_loss", "flat-line": "flat_line_loss"}
    power = 0  # of POWERS

    def draw(self, step, update):
        rng = BatchRNG(self.args.batch, "mixture adm", self.args.seed, step, update)
        return [adm.MicroBatch(rng, [""] * rng.n, k=0)]

    def diffuse_sample(self, b):
        x_t, t = super().diffuse_sample(b)
        if self.power and b.x0_hat.requires_grad:
            alpha, _ = self.teacher.alpha_sigma(t, x_t)
            weight = alpha.clamp(min=0.02) ** self.power
            b.x0_hat.register_hook(lambda gradient: weight * gradient)
        return x_t, t

    def measure_slope(self, b, difference):
        """ADM's, of which the mean in each quarter of the times is logged; long lines weigh more in it."""
        slope = super().measure_slope(b, difference)
        square = difference.square().mean(1)
        quarters = (4 * b.s / T).long()
        for quarter, name in enumerate(SLOPES):
            rows = quarters == quarter
            if rows.any():  # --t-range may leave a quarter out
                self.log(**{name: (slope[rows, 0] * square[rows]).sum() / square[rows].sum()})
        return slope

    def unit_line_loss(self, b):
        """--loss line with a line of length 1, so that every sample is moved as far."""
        x_fake = self.step_ode(b)
        line = F.normalize(b.x_real - b.x_fake, dim=1)
        return self.log(loss_G=-(line * x_fake).mean())

    def flat_line_loss(self, b):
        """--loss line without the way back through f's step: x_t is moved as x_fake is there. The line over
        dt is (x0_real - x0_fake) / sigma_t here, as the teacher is of flow matching."""
        x_t, t = self.diffuse_sample(b)
        with torch.no_grad():
            x0_fake, _ = self.teacher.predict(self.f, x_t, t, b.cond)
            x0_real, _ = self.teacher.guided(x_t, t, b.cond, self.args.guidance)
        _, sigma = self.teacher.alpha_sigma(t, x_t)
        return self.log(loss_G=-((x0_real - x0_fake) / sigma * x_t).mean())


# ----------------------------------------------------------------------------------------------------------
# Training
# ----------------------------------------------------------------------------------------------------------


def fit_network(mixture, members, iterations, seed):
    """A Network fitted to the closed form's velocity -> (network, its relative squared error)."""
    torch.manual_seed(seed)
    network = Network(members, mixture.dim)
    teacher = MixtureTeacher(mixture, network)
    random = generator("mixture fit", seed)
    optimizer = torch.optim.AdamW(network.parameters(), lr=2e-3, weight_decay=0, fused=True)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, iterations)
    for _ in range(iterations):
        error, _ = compare_velocities(teacher, BATCH * members, random)
        error.backward()
        optimizer.step()
        optimizer.zero_grad()
        schedule.step()
    network.requires_grad_(False)
    error, size = compare_velocities(teacher, SAMPLES * members, random)
    return network, round((error / size).item(), 5)


def compare_velocities(teacher, n, random):
    """-> (E |network - closed form|^2, E |closed form|^2) of velocities at n diffused samples."""
    x_0 = teacher.mixture.sample(n, random)
    eps = torch.randn(x_0.shape, generator=random)
    t = torch.rand(n, generator=random, dtype=torch.float64) * T
    x_t = teacher.diffuse(x_0, eps, t)
    x0_hat, eps_hat = teacher.guided(x_t, t, {}, 1)
    exact = eps_hat - x0_hat
    error = teacher.raw(teacher.denoiser, x_t, t, {}) - exact
    return error.square().mean(), exact.square().mean()


def make_words(words, members, seed, iterations):
    """The command line of a stage, as a list."""
    words = f"{WORDS} --batch {BATCH * members} --seed {seed} --iterations {iterations} {words}"
    return words.split()


def run_adp(teacher, pairs, seed, iterations):
    """adp.py's iterations, the most of them its warm-up -> the student's network."""
    torch.manual_seed(seed)
    words = f"{ADP_WORDS} --warmup {iterations * 5 // 6}"
    words = make_words(words, teacher.denoiser.members, seed, iterations)
    args = parse_adp_arguments(__doc__, words, common.FAMILIES)
    method = MixtureADP(args, teacher, pairs)
    for step in range(iterations):
        rate = args.warmup_lr if step < args.warmup else args.lr
        set_lr(args, step, {method.opt_G: rate})
        adp.iterate(method, step, adp.minimise)
    with method.ema.use():
        return copy.deepcopy(method.G).requires_grad_(False)


def make_start(name, teacher, x_T, x_0, seed, iterations):
    """The network that ADM starts from. x_T, x_0 [n, dim]: the teacher's pairs."""
    if name == "bad":  # in one step the teacher draws the mean, where there is no mode
        return teacher.denoiser
    if name == "collapsed":
        kept = torch.isin(teacher.mixture.find_modes(x_0), torch.tensor(KEPT))
        x_T, x_0 = x_T[kept], x_0[kept]
    return run_adp(teacher, Pairs(x_T, x_0), seed, iterations)


def run_adm(teacher, loss, options, seed, iterations):
    """adm.py's iterations. options: words of its command line -> (what was measured, a few samples of the
    first member in the plane [SHOWN, 2] at FRAMES + 1 moments)."""
    torch.manual_seed(seed)
    begin = time.process_time()
    words = make_words(f"{ADM_WORDS} {options}", teacher.denoiser.members, seed, iterations)
    args = parse_adm_arguments(__doc__, words, common.FAMILIES, MixtureADM)
    method = MixtureADM(args, teacher, [""])
    method.power = POWERS.get(loss, 0)
    rates = {method.opt_G: args.lr, method.opt_f: args.fake_lr, method.opt_heads: args.head_lr}

    history = {"tv_modes": [], "far": []}
    moments = []
    watch(method, history, moments)
    for step in range(iterations):
        if step == iterations * 9 // 10:
            method.log.take()  # what is logged is the mean over the last tenth
        set_lr(args, step, rates)
        adm.iterate(method, step, adm.minimise)
        if (step + 1) * FRAMES // iterations > step * FRAMES // iterations:
            watch(method, history, moments)
    with method.ema.use():
        samples = draw_samples(teacher, method.G, SAMPLES)
    measured = {
        "seeds": judge_members(teacher, samples),
        "log": {name: round(value.item(), 5) for name, value in method.log.take().items()},
        "history": history,
        "seconds": round(time.process_time() - begin),
    }
    return measured, moments


def draw_samples(teacher, net, n):
    """n samples of each member of a student, always of the same noise, [S n, dim]."""
    student = common.Student(teacher, "teacher", steps=1)
    return student.sample(net, BatchRNG(n * net.members, "mixture samples"), {})


def judge_members(teacher, samples):
    """Samples [S n, dim] -> what the mixture finds of each member, a list of S."""
    members = teacher.denoiser.members
    return [teacher.mixture.judge(samples[i::members]) for i in range(members)]


def watch(method, history, moments):
    """Adds the means over the members to history, {name: list}, and the first member's samples to moments."""
    teacher = method.teacher
    with method.ema.use():
        samples = draw_samples(teacher, method.G, WATCHED)
    seeds = judge_members(teacher, samples)
    for name, values in history.items():
        mean = statistics.mean(seed[name] for seed in seeds)
        values.append(round(mean, 5))
    first = samples[:: method.G.members][:SHOWN]
    moments.append(teacher.mixture.project(first).numpy())


def list_options(loss, args):
    """The words of adm.py's command line, one string a run of this loss."""
    options = []
    for dt in args.dt:
        for weight in args.weight:
            words = f"{LOSSES[loss].format(dt=dt, weight=weight)} {args.options}".strip()
            if words not in options:  # not every loss has a dt or a weight
                options.append(words)
    return options


def run_dimension(dim, args):
    """All runs in so many dimensions: yields (row of report.json, the moments of run_adm, if it is one)."""
    mixture = Mixture(dim)
    network, error = fit_network(mixture, args.seeds, args.fit, args.seed)
    teacher = MixtureTeacher(mixture, network)
    x_T = torch.randn(PAIRS, dim, generator=generator("mixture pairs", args.seed))
    x_0 = teacher.sample(x_T, {}, steps=50, scale=1)
    exact = mixture.sample(SAMPLES, generator("mixture exact", args.seed))

    def make_row(start, loss, options="", **measured):
        return {"dim": dim, "start": start, "loss": loss, "options": options, **measured}

    yield make_row("", "the mixture itself", seeds=[mixture.judge(exact)], fit=error), []
    yield make_row("", "the closed form, 50 steps", seeds=[mixture.judge(x_0)]), []
    for start in args.starts:
        net = make_start(start, teacher, x_T, x_0, args.seed, args.adp_iterations)
        samples = draw_samples(teacher, net, SAMPLES)
        yield make_row(start, "before", seeds=judge_members(teacher, samples)), []
        for loss in args.losses:
            for options in list_options(loss, args):
                started = MixtureTeacher(mixture, network, net)
                measured, moments = run_adm(started, loss, options, args.seed, args.iterations)
                yield make_row(start, loss, options, **measured), moments


# ----------------------------------------------------------------------------------------------------------
# Results
# ----------------------------------------------------------------------------------------------------------

COLUMNS = {  # of a seed: heading
    "covered": "modes",
    "tv_among": "TV of modes",
    "tv_modes": "TV with gaps",
    "tv_cells": "TV of cells",
    "in_none": "in no mode",
    "far": "far mode",
    "light": "light mode",
    "width": "width across",
}
GAUGES = ("cosine", "across", "D_gap", "D_abs")


def make_table(rows):
    """Rows of report.json -> a Markdown table, mean ± standard deviation over the seeds. A column that says
    the same in all rows is left out."""
    lines = [["dim", "start", "loss", "options", *COLUMNS.values(), *GAUGES, "slope by t", "CPU s"]]
    for row in rows:
        cells = [str(row[name]) for name in ("dim", "start", "loss", "options")]
        seeds = [{**seed, **read_masses(seed["masses"])} for seed in row["seeds"]]
        for name in COLUMNS:
            values = [seed[name] for seed in seeds]
            cells.append("" if None in values else format_cell(values))
        log = row.get("log", {})
        for name in GAUGES:
            cells.append(f"{log[name]:.2g}" if name in log else "")
        cells.append(format_slopes(log))
        cells.append(str(row.get("seconds", "")))
        lines.append(cells)
    columns = [column for column in zip(*lines) if len(set(column[1:])) > 1]
    return format_markdown(list(zip(*columns)))


def read_masses(masses):
    """The shares of a student's samples in each mode and in none -> columns of the table. Among the modes TV
    is of those samples alone that lie in one, so that what lies between modes does not count as lost."""
    found, exact = torch.tensor(masses), Mixture(2).exact_modes()
    inside = found[:MODES].sum()
    among = measure_variation(found[:MODES] / inside, exact[:MODES] / exact[:MODES].sum())
    known = inside >= 0.1  # of fewer samples it is mostly chance
    return {"light": masses[LIGHT], "tv_among": among.item() if known else None}


def format_slopes(log):
    """D's slope in the four quarters of the times, of which 1 is the mean; nothing where none was logged."""
    slopes = [log[name] for name in SLOPES if name in log]
    return " ".join(f"{slope / statistics.mean(slopes):.2f}" for slope in slopes)


def read_arguments(argv):
    parser = Parser(__doc__)
    add = parser.group("what runs: all that these choices give together")
    dimension = number(int, "at least 2", lambda value: value >= 2)
    add("--dim", "dimensions of the samples", type=dimension, nargs="+", default=[2], shown="2")
    add("--starts", "of ADM", choices=STARTS, nargs="+", default=STARTS, shown="all")
    drawn = "those of docs/mixture.md's figure"
    add("--losses", "of ADM's student", choices=LOSSES, nargs="+", default=DRAWN, shown=drawn)
    add("--dt", "of adm.py", nargs="+", default=["1/64"], shown="1/64")
    add("--weight", "--r1 and --r2 of adm.py", nargs="+", default=["0.25"], shown="0.25")
    add("--options", "more words for adm.py, as --options='--fake-lr 1e-4'", default="", shown="none")
    add = parser.group("how")
    add("--seeds", "how many train at once", type=positive, default=5)
    add("--seed", "seed of everything random", type=seed_number, default=0)
    add("--fit", "iterations in which the network is fitted", type=positive, default=2000)
    add("--adp-iterations", "of the good and the collapsed start", type=positive, default=1500)
    add("--iterations", "of ADM", type=positive, default=1500)
    add("--quick", "two seeds, and iterations enough to see that it runs", action="store_true")
    add("--out", "folder of the results", type=new_folder, default="runs/mixture")
    add("--report", "only print the table of this report.json")
    args = parser.parse_args(argv)
    if args.quick:
        args.seeds, args.iterations, args.adp_iterations, args.fit = 2, 60, 60, 200
    return args


def main(argv=None):
    args = read_arguments(argv)
    if args.report:
        report = read_json(args.report)
        if not report:
            raise UserError(f"--report {args.report}: it is no report.json of this script")
        print(make_table(report["rows"]))
        return
    torch.set_num_threads(1)
    make_folder(args.out)
    report = {
        "command": shlex.join(["python", "tiny/mixture.py", *(sys.argv[1:] if argv is None else argv)]),
        "seed": args.seed,
        "commit": read_commit(),
        "machine": describe_machine(),
        "date": datetime.date.today().isoformat(),
        "exact_masses": Mixture(2).exact_modes().tolist(),
        "rows": [],
    }
    moments = {}  # of the first dimension, dt and weight: {(start, loss): those of run_adm}
    for dim in args.dim:
        for row, points in run_dimension(dim, args):
            report["rows"].append(row)
            write_json(os.path.join(args.out, "report.json"), report)
            print(dim, row["start"], row["loss"], row["options"], flush=True)
            if points:
                moments.setdefault((row["start"], row["loss"]), points)
    table = make_table(report["rows"])
    write_text(os.path.join(args.out, "table.md"), table + "\n")
    save_figure(Mixture(2), moments, os.path.join(args.out, "figure.png"))
    save_animation(Mixture(2), moments, args.iterations, os.path.join(args.out, "animation.gif"))
    save_curves(report["rows"], Mixture(2), args.iterations, os.path.join(args.out, "curves.png"))
    print(table)


if __name__ == "__main__":
    launch(main)
