"""Stage 2: adversarial distribution matching (ADM), the paper's Algorithm 1.

    torchrun --nproc_per_node=8 adm.py --teacher sdxl --init runs/adp-sdxl --prompts prompts.txt --shard zero1
    torchrun --nproc_per_node=8 adm.py --teacher cogvideox --prompts prompts.txt --shard zero1  # eight steps

F_phi is the frozen teacher: the real score, and the backbone of the discriminator D_tau. f_psi is the fake
score, which follows the student G_theta. Algorithm 1 [method of class ADM], T = 1000, dt = --dt times T:

1. x0_hat = G_theta(x_t', t', c) for prompts c, one of G's times t', x_t' by backward simulation [generate].
2. Update psi by f_psi's denoising loss at x_t = alpha_t x0_hat + sigma_t eps, t ~ U[0, T] [fake_score_loss].
3. x_t again, t ~ U(dt, T]; x_fake, x_real: one ODE step from x_t to t - dt by f_psi and by guided F_phi.
   Update theta by L(theta) = -E D_tau(x_fake, t - dt, c) [generator_loss].
4. Update tau by L(tau) = E relu(1 + D_tau(x_fake, t - dt, c))
                        + E relu(1 - D_tau(x_real, t - dt, c)) + R1 + R2 (ours: penalty) [discriminator_loss].
"""

import support.interrupt  # noqa: F401  Ctrl-C while torch loads
from dataclasses import dataclass

import torch
import torch.nn.functional as F

import common
from common import T, hinge_discriminator, hinge_generator
from metrics.held_out import make_held_out
from support.arguments import parse_adm_arguments
from support.errors import launch
from support.parallel import freeze, join_processes
from support.prompts import read_training_prompts
from support.rng import RowRNG, draw_integer, make_rngs
from support.run import Run
from support.tensors import broadcast, detach, mean_of_rows
from support.training import Means, MovingAverage, minimise, prepare, set_lr, watch_gradient
from tools.plan import print_plan


@dataclass
class MicroBatch:
    """What B samples carry from one line of the algorithm to the next; latents are [B, C, (F,) H, W]."""

    rng: RowRNG  # a random generator for each sample: rng.uniform() is [B]
    prompts: list  # B strings
    k: int  # t' = student.times[k]; at 0 x_t' is pure noise
    cond: dict = None  # c: {name: [B, ...]}
    x_t_prime: torch.Tensor = None  # latents, the student's input
    x0_hat: torch.Tensor = None  # latents, the student's sample
    s: torch.Tensor = None  # [B], t - dt
    x_fake: torch.Tensor = None  # latents at time s, detached
    x_real: torch.Tensor = None  # latents at time s
    maps_fake: list = None  # D's maps of x_fake, detached: [B, C_i, (F,) H_i, W_i] each
    maps_real: list = None  # of x_real, where secant_loss made them


class ADM:
    """The networks of Algorithm 1, and a method for each of its lines."""

    # --loss: the method that is line 3, or in its place
    losses = {"adm": "generator_loss", "secant": "secant_loss", "line": "line_loss", "dmd": "dmd_loss"}
    with_discriminator = ("adm", "secant")

    def __init__(self, args, teacher, prompts):
        self.args = args
        self.teacher = teacher
        self.prompts = prompts
        self.log = Means()  # log(name=x) notes x for metrics.jsonl, and returns it
        self.student, folder = common.start_student(args, teacher)
        self.G = teacher.trainable(args, "student", folder)
        self.f = teacher.trainable(args, "fake")
        self.heads = teacher.make_heads(args.head_width) if args.loss in self.with_discriminator else None
        self.ema = MovingAverage(self.G, args.ema)
        self.G_train, self.opt_G = prepare(self.G, args.lr, args)  # the same weights, in DDP, to learn
        self.f_train, self.opt_f = prepare(self.f, args.fake_lr, args)
        self.heads_train, self.opt_heads = prepare(self.heads, args.head_lr, args)

    def draw(self, step, update):
        """The micro-batches of an update. The time t' is the same in all of them and on every rank."""
        k = draw_integer(self.student.steps, "t_prime", self.args.seed, step, update)
        rngs = make_rngs(self.args, self.teacher.device, "adm", step, update)
        return [MicroBatch(rng, rng.choose(self.prompts), k) for rng in rngs]

    def generate(self, b):
        """Line 1: x0_hat = G_theta(x_t', t', c), x_t' by backward simulation from pure noise."""
        b.cond = self.teacher.encode(b.prompts)
        b.x_t_prime = self.student.simulate(self.G, b.rng, b.cond, b.k)
        self.denoise(b)

    def denoise(self, b):
        """The last step of line 1: x0_hat of x_t', with a graph to theta where gradients are enabled."""
        b.x0_hat = self.student.denoise(self.G_train, b.x_t_prime, b.k, b.cond)

    def fake_score_loss(self, b):
        """Line 2: L(psi) = E |f_psi(x_t, t, c) - target|^2; target: eps, v or eps - x0_hat, as F_phi's."""
        x_0 = b.x0_hat.detach()
        t = b.rng.uniform() * T
        eps = b.rng.normal_like(x_0)
        x_t = self.teacher.diffuse(x_0, eps, t)
        raw = self.teacher.raw(self.f_train, x_t, t, b.cond)
        return self.log(loss_f=F.mse_loss(raw, self.teacher.target(x_0, eps, t)))

    def diffuse_sample(self, b):
        """Line 3: x_t = alpha_t x0_hat + sigma_t eps, t ~ U(dt, T] -> (x_t, t), differentiable in theta."""
        if torch.is_grad_enabled() and not b.x0_hat.requires_grad:
            self.denoise(b)  # --accumulate: line 1 kept no graph
        low, high = self.args.t_range  # dt / T and 1, if --t-range says no other
        t = (high - b.rng.uniform() * (high - low)) * T
        eps = b.rng.normal_like(b.x0_hat)  # paper silent: shared sample: line 2's, new t and eps
        return self.teacher.diffuse(b.x0_hat, eps, t), t

    def step_ode(self, b):
        """Line 3: x_fake and x_real, one ODE step from x_t to t - dt -> x_fake, differentiable in theta."""
        x_t, t = self.diffuse_sample(b)
        b.s = t - self.args.dt * T
        with torch.set_grad_enabled(torch.is_grad_enabled() and not self.args.straight_through):
            x0_fake, eps_fake = self.teacher.predict(self.f, x_t, t, b.cond)
            x_fake = self.teacher.step(x0_fake, eps_fake, b.s)
        if self.args.straight_through:  # ours, not the paper's
            x_fake = x_fake + (x_t - x_t.detach())  # its value, and the gradient of x_t
        with torch.no_grad():
            x0_real, eps_real = self.teacher.guided(x_t, t, b.cond, self.args.guidance)
            b.x_real = self.teacher.step(x0_real, eps_real, b.s)
            self.dmd_direction(b.x0_hat, x0_fake, x0_real)  # to log dmd_loss and std
        b.x_fake = x_fake.detach()
        return x_fake

    def generator_loss(self, b):
        """Line 3: L(theta) = -E D_tau(x_fake, t - dt, c); gradients go through D, f_psi's step, x_t and G."""
        x_fake = self.step_ode(b)
        maps_fake = self.teacher.features(x_fake, b.s, b.cond)
        b.maps_fake = detach(maps_fake)
        watch_gradient(x_fake, b.x_real - b.x_fake, self.log)
        if self.args.project:  # ours, not the paper's
            project_gradient(x_fake, b.x_real - b.x_fake)
        return self.log(loss_G=hinge_generator(self.heads(maps_fake)))

    def secant_loss(self, b):
        """Ours, in line 3's place: x_fake is moved to x_real by D's slope on the line between them."""
        x_fake = self.step_ode(b)
        difference = b.x_real - b.x_fake
        slope = self.measure_slope(b, difference)  # derived in docs/paper-gaps.md
        return self.log(loss_G=-(slope * difference * x_fake).mean())

    def line_loss(self, b):
        """Ours, in line 3's place, without D: x_fake is moved to x_real by a constant slope, T/dt."""
        x_fake = self.step_ode(b)
        slope = 1 / self.args.dt
        return self.log(loss_G=-(slope * (b.x_real - b.x_fake) * x_fake).mean())

    @torch.no_grad()
    def measure_slope(self, b, difference):
        """D(x_real) - D(x_fake) over the mean square of x_real - x_fake [B, ...], row by row [B, 1, ...]."""
        b.maps_fake = self.teacher.features(b.x_fake, b.s, b.cond)
        b.maps_real = self.teacher.features(b.x_real, b.s, b.cond)
        D_real, D_fake = self.heads(b.maps_real, b.maps_fake)
        rise = broadcast((D_real - D_fake).mean(1), difference)
        return rise / mean_of_rows(difference.square()).clamp(min=1e-12)  # 0 where the two are the same

    def dmd_loss(self, b):
        """The baseline in line 3's place (DMD): a loss whose gradient in x0_hat is DMD's direction."""
        x_t, t = self.diffuse_sample(b)
        with torch.no_grad():
            x0_fake, _ = self.teacher.predict(self.f, x_t, t, b.cond)
            x0_real, _ = self.teacher.guided(x_t, t, b.cond, self.args.guidance)
            goal = b.x0_hat - self.dmd_direction(b.x0_hat, x0_fake, x0_real)
        return self.log(loss_G=0.5 * F.mse_loss(b.x0_hat, goal))

    def dmd_direction(self, x0_hat, x0_fake, x0_real):
        """(x0_fake - x0_real) / mean |x0_hat - x0_real| of the row; half its square is the paper's Fig. 3."""
        direction = (x0_fake - x0_real) / mean_of_rows((x0_hat - x0_real).abs())
        self.log(dmd_loss=0.5 * direction.square().mean(), std=x0_hat.flatten(1).std(1).mean())
        return direction

    def discriminator_loss(self, b):
        """Line 4: L(tau) = E relu(1 + D_tau(x_fake, t - dt, c)) + E relu(1 - D_tau(x_real, ..)) + R1 + R2."""
        with torch.no_grad():
            maps_real = b.maps_real or self.teacher.features(b.x_real, b.s, b.cond)
        D_real, D_fake = self.heads_train(maps_real, b.maps_fake)
        self.log(D_gap=(D_real - D_fake).mean(), D_abs=torch.cat([D_real, D_fake]).abs().mean())
        r1 = self.penalty(b.x_real, D_real, b, self.args.r1)
        r2 = self.penalty(b.x_fake, D_fake, b, self.args.r2)
        return self.log(loss_D=hinge_discriminator(D_real, D_fake) + r1 + r2)

    def penalty(self, x, D, b, weight):
        """R1 of x_real, R2 of x_fake: weight N (dt/T) |grad D|^2 by finite differences, N numbers a row."""
        # paper silent: penalties: nothing else holds D's slope; with them grad D is nearer x_real - x_fake
        if not weight:
            return 0
        with torch.no_grad():
            x_near = x + self.args.r_noise * b.rng.normal_like(x)
            maps = self.teacher.features(x_near, b.s, b.cond)
        change = (D - self.heads_train(maps)).mean(1)
        slope = change.square().mean() / self.args.r_noise**2
        return weight * x[0].numel() * self.args.dt * slope


def project_gradient(x_fake, difference):
    """--project: of the gradient of x_fake [B, ...] only the part along x_real - x_fake goes on, row by row;
    docs/paper-gaps.md#the-projected-gradient."""
    line = F.normalize(difference.flatten(1))

    def project(gradient):
        along = (gradient.flatten(1) * line).sum(1, keepdim=True)
        return (along * line).view_as(gradient)

    if x_fake.requires_grad:
        x_fake.register_hook(project)


def iterate(adm, step, minimise):
    """An iteration: --ttur updates of f_psi, each followed by one of D_tau; in the last, G_theta's comes
    between them. minimise: support.training's, for which --plan and the benchmark have their own."""
    args = adm.args
    student_loss = getattr(adm, adm.losses[args.loss])
    for update in range(args.ttur):  # paper silent: ttur: each update has samples of its own
        student_learns = step >= args.warmup and update == args.ttur - 1
        batch = adm.draw(step, update)
        with torch.set_grad_enabled(student_learns and len(batch) == 1):  # else line 3 does it again
            for b in batch:
                adm.generate(b)
        adm.log(norm_f=minimise(adm.fake_score_loss, batch, adm.f_train, adm.opt_f, args.clip))
        if student_learns:
            with freeze(adm.f, adm.heads):  # only theta learns from line 3
                adm.log(norm_G=minimise(student_loss, batch, adm.G_train, adm.opt_G, args.clip))
            adm.ema.step()
        elif adm.heads:
            with torch.no_grad():  # for what line 4 needs of it
                for b in batch:
                    student_loss(b)
        if adm.heads:
            adm.log(norm_D=minimise(adm.discriminator_loss, batch, adm.heads_train, adm.opt_heads, args.clip))


def main(argv=None):
    args = parse_adm_arguments(__doc__, argv, common.FAMILIES, ADM)
    if args.plan:
        return print_plan(args, ADM, iterate)
    prompts = read_training_prompts(args.prompts, args.prompt_column)
    teacher = common.load_training_teacher(args, join_processes(args.seed), prompts)
    held_out = make_held_out(args, teacher)  # refuses before the networks are read
    adm = ADM(args, teacher, prompts)
    run = Run("adm", args, adm, held_out)
    for step in run.iterations():
        set_lr(args, step, {adm.opt_G: args.lr, adm.opt_f: args.fake_lr, adm.opt_heads: args.head_lr})
        iterate(adm, step, minimise)
        run.log(step + 1)
        run.finish(step + 1, prompts)


if __name__ == "__main__":
    launch(main)
