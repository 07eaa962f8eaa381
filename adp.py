"""Stage 1: adversarial distillation pre-training (ADP) of a one-step student, on ODE pairs of the teacher.

    torchrun --nproc_per_node=8 adp.py --teacher sdxl
    python adp.py --teacher assets/tiny-sdxl --pairs pairs/tiny --pixel-backbone assets/tiny-sam.pth --out runs/adp

The student starts from the teacher and learns the velocity x_T - x_0 of the straight path between the two ends of a pair, against a
latent discriminator (the frozen teacher with heads) and a pixel discriminator (SAM's image encoder with heads).
"""
import os

import torch
import torch.nn.functional as F

import common
from collect_ode import Pairs
from common import T, hinge_discriminator, hinge_generator


def main(argv=None):
    parser = common.Parser(__doc__)
    common.add_training_arguments(parser)
    parser.add("--pairs", "folder of collect_ode.py (default pairs/TEACHER)")
    parser.add("--pixel-backbone", "a SAM checkpoint file; sam_vit_b, sam_vit_l, sam_vit_h; dinov2 or a folder of one", default="sam_vit_b")
    parser.add("--lambda-latent", "weight of the latent discriminator", type=common.non_negative, default=0.85)  # paper
    parser.add("--lambda-pixel", "weight of the pixel discriminator; 0 leaves it out", type=common.non_negative, default=0.15)  # paper
    parser.add("--warmup", "first iterations on the velocity's squared error alone; with all of them, and --lambda-pixel 0, this is rectified flow "
               "(default 500, and 0 for a teacher that predicts velocity)", type=common.whole)
    parser.add("--warmup-lr", "of the student in the warm-up (default --lr)", type=common.non_negative)
    parser.add("--mse", "weight of the velocity's squared error after the warm-up", type=common.non_negative, default=0.0)
    args = parser.parse_args(argv)
    if args.plan:
        from tiny.plan import print_plan

        return print_plan(args)

    device = common.start_processes(args.seed)
    teacher = common.load_training_teacher(args, device)
    if teacher.video and args.lambda_pixel:
        raise common.UserError(common.PixelBackbone.NO_VIDEO)
    pairs = Pairs(args.pairs or os.path.join("pairs", common.short_name(args.teacher)), teacher)
    backbone = common.PixelBackbone(args.pixel_backbone, device, teacher.dtype) if args.lambda_pixel else None

    def discriminator_maps(x_0, x_t_prime, t_prime, cond):
        """What the heads see: the teacher's maps of the re-noised latents and, beside them, SAM's maps of the decoded picture."""
        maps = teacher.features(x_t_prime, t_prime, cond)
        return maps + backbone.features(teacher.decode(x_0)) if backbone else maps

    warmup = (0 if teacher.prediction == "flow" else 500) if args.warmup is None else args.warmup
    student = common.Student(teacher, "velocity", steps=1)
    G = teacher.trainable(args, "student")
    with torch.no_grad():
        x_T, x_0, prompts = pairs.batch([0])
        x_0, cond = x_0.to(device), teacher.encode(prompts)
        maps = discriminator_maps(x_0, x_0, torch.zeros(1, device=device), cond)
    heads = common.Heads(maps, args.head_width).to(device)
    # D = lambda_1 D_tau1 + lambda_2 D_tau2, each the mean of its heads
    latent_maps, pixel_maps = len(teacher.taps), len(maps) - len(teacher.taps)
    weights = torch.tensor([args.lambda_latent / latent_maps] * latent_maps + [args.lambda_pixel / max(1, pixel_maps)] * pixel_maps, device=device)

    ema = common.EMA(G, args.ema)
    opt_G, opt_heads = common.adamw(G.parameters(), args.lr, args), common.adamw(heads.parameters(), args.head_lr, args)
    run = common.Run("adp", args, student, {"G": G, "ema": ema, "heads": heads, "opt_G": opt_G, "opt_heads": opt_heads})
    G_train, heads_train = common.distributed(G), common.distributed(heads)

    def all_prompts_of(step):
        return [prompt for b in common.micro_batches(args, (args.seed, step), device) for prompt in pairs.prompts(b.rows.integers(len(pairs)))]

    for step in run.iterations(all_prompts_of):
        warming_up = step < warmup
        common.set_lr(opt_G, args.warmup_lr if warming_up and args.warmup_lr else args.lr, step, args)
        batch = common.micro_batches(args, (args.seed, step), device)
        metrics = common.Means()
        for b in batch:
            x_T, x_0, prompts = pairs.batch(b.rows.integers(len(pairs)))
            b.x_T, b.x_0, b.cond = x_T.to(device), x_0.to(device), teacher.encode(prompts)

        for b in common.updating(opt_G, G_train, batch, args.clip, metrics, "norm_G"):
            # Straight path: x_t = (1 - t/T) x_0 + (t/T) x_T, with generator times on the cubic schedule t = [1 - (u/T)^3] T
            t = (1 - b.rows.uniform() ** 3) * T
            x_t = student.diffuse(b.x_0, b.x_T, t)
            velocity = student.velocity(G_train, x_t, t, b.cond)
            mse = F.mse_loss(velocity, b.x_T - b.x_0)
            metrics.add(mse=mse)
            if warming_up:  # paper silent: an eps or v network's output becomes a velocity by regression first
                (mse / len(batch)).backward()
                continue
            # Generator: L(theta) = -E[lambda_1 D_tau1(x~_t', t') + lambda_2 D_tau2(x~_0)], discriminator times t' ~ U[0, T]
            x0_tilde = x_t - student.ratio(t, x_t) * velocity
            b.t_prime = b.rows.uniform() * T
            x_fake = teacher.diffuse(x0_tilde, b.rows.normal(*teacher.latent_shape), b.t_prime)
            maps_fake = discriminator_maps(x0_tilde, x_fake, b.t_prime, b.cond)
            with common.frozen(heads):
                loss_G = hinge_generator(heads(maps_fake), weights) + args.mse * mse
                (loss_G / len(batch)).backward()
            metrics.add(loss_G=loss_G)
            b.maps_fake = [m.detach() for m in maps_fake]
        ema.update()

        # Discriminators: hinge on the pairs' x_0 and on the same x~_0, whose maps are at hand
        judged = [] if warming_up else common.updating(opt_heads, heads_train, batch, args.clip, metrics, "norm_heads")
        for b in judged:
            with torch.no_grad():
                x_real = teacher.diffuse(b.x_0, b.rows.normal(*teacher.latent_shape), b.t_prime)
                maps_real = discriminator_maps(b.x_0, x_real, b.t_prime, b.cond)
            D_real, D_fake = heads_train([torch.cat(pair) for pair in zip(maps_real, b.maps_fake)]).chunk(2)
            loss_D = hinge_discriminator(D_real, D_fake, weights)
            (loss_D / len(batch)).backward()
            metrics.add(loss_D=loss_D, D_real=(D_real * weights).sum(1).mean(), D_fake=(D_fake * weights).sum(1).mean())

        run.log(step + 1, metrics)
        if run.due(step + 1):
            run.save(step + 1, G, ema, pairs.index["prompts"])


if __name__ == "__main__":
    common.launch(main)
