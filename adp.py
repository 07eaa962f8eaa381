"""Stage 1: adversarial distillation pre-training (ADP) of a one-step student, on ODE pairs of the teacher.

    torchrun --nproc_per_node=8 adp.py --teacher sdxl
    python adp.py --teacher assets/tiny-sdxl --pairs pairs/tiny --pixel-backbone assets/tiny-sam.pth

The student G_theta starts from the teacher and learns the velocity x_T - x_0 of the straight path between
the ends of a pair, against a latent discriminator D_tau1 (the frozen teacher with heads) and a pixel
discriminator D_tau2 (SAM's image encoder with heads). One iteration [method of class ADP], T = 1000:

1. Draw pairs (x_T, x_0), t = [1 - (u/T)^3] T, u ~ U[0, T], and x_t = (1 - t/T) x_0 + (t/T) x_T;
   x~_0 = x_t - (t/T) G_theta(x_t, t, c) [predict]. All t train, though only t = T is sampled.
   In the warm-up update theta by E |G_theta(x_t, t, c) - (x_T - x_0)|^2 alone [velocity_loss].
2. t' ~ U[0, T]; x~_t' is x~_0, noised to t' as the teacher does. Update theta by
   L(theta) = -E [lambda_1 D_tau1(x~_t', t', c) + lambda_2 D_tau2(x~_0)], and, ours, --mse (0) times the
   error of the warm-up [generator_loss].
3. Update tau by the hinge loss of x~_0 and of the pairs' x_0, noised anew to t' [discriminator_loss].
"""

import support.interrupt  # noqa: F401  Ctrl-C while torch loads
from dataclasses import dataclass

import torch
import torch.nn.functional as F

import common
from common import T, hinge_discriminator, hinge_generator, weigh
from metrics.held_out import make_held_out
from support.arguments import parse_adp_arguments
from support.errors import launch, note
from support.pairs import Pairs
from support.parallel import freeze, join_processes
from support.rng import RowRNG, make_rngs
from support.run import Run
from support.tensors import detach
from support.training import Means, MovingAverage, minimise, prepare, set_lr
from tools.plan import print_plan


@dataclass
class MicroBatch:
    """What B samples carry from one update to the next; latents are [B, C, (F,) H, W]."""

    rng: RowRNG  # a random generator for each sample: rng.uniform() is [B]
    numbers: list  # of the pairs, B
    prompts: list  # of the pairs, B strings
    cond: dict = None  # c: {name: [B, ...]}
    x_0: torch.Tensor = None  # latents, the clean end of the pairs
    t_prime: torch.Tensor = None  # [B], t', the latent discriminator's time (not the student's, as in adm.py)
    maps_fake: list = None  # the discriminators' maps of x~_0, detached: [B, C_i, (F,) H_i, W_i] each


class ADP:
    """The networks of ADP, and a method for each of its losses."""

    def __init__(self, args, teacher, pairs):
        self.args = args
        self.teacher = teacher
        self.pairs = pairs
        self.log = Means()  # log(name=x) notes x for metrics.jsonl, and returns it
        self.student = common.Student(teacher, "velocity", steps=1)
        self.G = teacher.trainable(args, "student")
        self.ema = MovingAverage(self.G, args.ema)
        self.backbone = None
        if args.lambda_pixel:
            self.backbone = common.PixelBackbone(args.pixel_backbone, teacher.device, teacher.dtype)
        self.heads = teacher.make_heads(args.head_width, self.backbone)
        # D = lambda_1 D_tau1 + lambda_2 D_tau2, each the mean of its heads
        n_latent = len(teacher.taps)
        weights = [args.lambda_latent / n_latent] * n_latent
        if self.backbone:
            n_pixel = len(self.heads.heads) - n_latent
            weights += [args.lambda_pixel / n_pixel] * n_pixel
        self.weights = torch.tensor(weights, device=teacher.device)
        self.G_train, self.opt_G = prepare(self.G, args.lr, args)  # the same weights, in DDP, to learn
        self.heads_train, self.opt_heads = prepare(self.heads, args.head_lr, args)

    def draw(self, step, update=0):
        """The micro-batches of an iteration: which pairs. (update is ADM's.)"""
        batch = []
        for rng in make_rngs(self.args, self.teacher.device, "adp", step):
            numbers = rng.integers(len(self.pairs))
            batch.append(MicroBatch(rng, numbers, self.pairs.prompts(numbers)))
        return batch

    def predict(self, b):
        """1. -> x~_0, and the squared error of the velocity."""
        b.cond = self.teacher.encode(b.prompts)
        x_T, x_0 = self.pairs.batch(b.numbers)
        x_T, b.x_0 = x_T.to(self.teacher.device), x_0.to(self.teacher.device)
        t = (1 - b.rng.uniform() ** self.args.time_power) * T
        x_t = self.student.diffuse(b.x_0, x_T, t)
        velocity = self.student.velocity(self.G_train, x_t, t, b.cond)
        error = F.mse_loss(velocity, x_T - b.x_0)
        self.log(mse=error)
        return x_t - self.student.ratio(t, x_t) * velocity, error

    def velocity_loss(self, b):
        """The warm-up: E |G_theta(x_t, t, c) - (x_T - x_0)|^2."""
        # paper silent: velocity warm-up: an eps or v network's output is called velocity and regressed
        _, error = self.predict(b)
        return error

    def generator_loss(self, b):
        """2. L(theta) = -E [lambda_1 D_tau1(x~_t', t', c) + lambda_2 D_tau2(x~_0)] (+ --mse error)."""
        x0_tilde, error = self.predict(b)
        b.t_prime = b.rng.uniform() * T
        maps_fake = self.maps(x0_tilde, b)
        b.maps_fake = detach(maps_fake)
        loss = hinge_generator(self.heads(maps_fake), self.weights) + self.args.mse * error
        return self.log(loss_G=loss)

    def maps(self, x_0, b):
        """The heads' input: the teacher's maps of x_0, noised to t', and SAM's maps of the decoded x_0."""
        x_t_prime = self.teacher.diffuse(x_0, b.rng.normal_like(x_0), b.t_prime)
        maps = self.teacher.features(x_t_prime, b.t_prime, b.cond)
        if self.backbone:
            maps += self.backbone.features(self.teacher.decode(x_0))
        return maps

    def discriminator_loss(self, b):
        """3. L(tau) = E relu(1 + D_tau(x~_0)) + E relu(1 - D_tau(x_0)), with the weights of 2."""
        with torch.no_grad():
            maps_real = self.maps(b.x_0, b)
        D_real, D_fake = self.heads_train(maps_real, b.maps_fake)
        self.log(D_real=weigh(D_real, self.weights), D_fake=weigh(D_fake, self.weights))
        return self.log(loss_D=hinge_discriminator(D_real, D_fake, self.weights))


def iterate(adp, step, minimise):
    """An iteration: one update of G_theta and, after the warm-up, one of the heads. minimise:
    support.training's, for which --plan and the benchmark have their own."""
    batch = adp.draw(step)
    if step < adp.args.warmup:
        adp.log(norm_G=minimise(adp.velocity_loss, batch, adp.G_train, adp.opt_G, adp.args.clip))
        adp.ema.step()
        return
    with freeze(adp.heads):
        adp.log(norm_G=minimise(adp.generator_loss, batch, adp.G_train, adp.opt_G, adp.args.clip))
    adp.ema.step()
    adp.log(norm_heads=minimise(adp.discriminator_loss, batch, adp.heads_train, adp.opt_heads, adp.args.clip))


def main(argv=None):
    args = parse_adp_arguments(__doc__, argv, common.FAMILIES)
    if args.plan:
        return print_plan(args, ADP, iterate)
    teacher = common.load_training_teacher(args, join_processes(args.seed))
    pairs = Pairs(args.pairs, teacher)
    if args.warmup is None:
        args.warmup = 0 if teacher.prediction == "flow" else 500
    if args.warmup >= args.iterations:
        note("--warmup covers all iterations, so that no discriminator moves the student")
    held_out = make_held_out(args, teacher)
    adp = ADP(args, teacher, pairs)
    run = Run("adp", args, adp, held_out)
    for step in run.iterations():
        set_lr(args, step, {adp.opt_G: args.warmup_lr if step < args.warmup else args.lr})
        iterate(adp, step, minimise)
        run.log(step + 1)
        run.finish(step + 1, pairs.index["prompts"])


if __name__ == "__main__":
    launch(main)
