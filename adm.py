"""Stage 2: adversarial distribution matching (ADM), the paper's Algorithm 1.

    torchrun --nproc_per_node=8 adm.py --teacher sdxl --init runs/adp-sdxl --prompts prompts.txt   # one step, after ADP: DMDX
    torchrun --nproc_per_node=8 adm.py --teacher sd3-medium --prompts prompts.txt                  # four steps, from the teacher
    torchrun adm.py --teacher cogvideox --steps 8                                                  # video
    python adm.py --teacher assets/tiny-sdxl --init runs/adp --prompts prompts/shapes_train.txt --loss dmd   # the baseline

F_phi is the frozen teacher: the real score, and the backbone of the discriminator D_tau. f_psi is the fake score, which follows the
student G_theta. No pictures are needed, only prompts. `--loss dmd` replaces the discriminator by the DMD loss.
"""
import torch
import torch.nn.functional as F

import common
from common import T, hinge_discriminator, hinge_generator


def main(argv=None):
    parser = common.Parser(__doc__)
    common.add_training_arguments(parser)
    parser.add("--prompts", "text file, a prompt a line", default=common.PROMPTS)
    parser.add("--init", "checkpoint of adp.py or adm.py to start from (default the teacher)")
    parser.add("--steps", f"of the student (those of --init, else the paper's: {common.family_default('student_steps')})", type=common.steps)
    parser.add("--loss", "what moves the student", choices=("adm", "dmd"), default="adm")
    parser.add("--guidance", f"the teacher's classifier-free guidance scale (default {common.family_default('adm_guidance')})", type=common.non_negative)
    parser.add("--dt", "length of the ODE step, in units of T", type=common.number(float, "between 0 and 1", lambda value: 0 < value < 1), default=1 / 64)  # peers
    parser.add("--ttur", "updates of fake score and discriminator for each of the generator", type=common.positive, default=1)  # paper
    parser.add("--fake-lr", "of the fake score", type=common.non_negative, default=5e-7)
    parser.add("--warmup", "first iterations, in which only the fake score and the heads learn", type=common.whole, default=0)
    # paper silent: without a penalty D drifts, and takes the student along (README, "What the paper leaves open"); 0 turns it off
    parser.add("--r1", "weight of D's gradient penalty on real samples, times dt", type=common.non_negative, default=1.0)
    parser.add("--r2", "the same on fake samples", type=common.non_negative, default=1.0)
    parser.add("--r-noise", "standard deviation of the noise that the penalties take their differences with", type=common.above_zero, default=0.1)
    args = parser.parse_args(argv)
    if args.plan:
        from tiny.plan import print_plan

        return print_plan(args)

    prompts = common.read_prompts(args.prompts)
    device = common.start_processes(args.seed)
    teacher = common.load_training_teacher(args, device)
    teacher.check(prompts)
    args.guidance = teacher.adm_guidance if args.guidance is None else args.guidance

    # G_theta starts from ADP or the teacher, f_psi from the teacher; D_tau is the teacher's backbone with new heads.
    folder, student = None, common.Student(teacher, "teacher", args.steps or teacher.student_steps)
    if args.init:
        folder, student, _ = common.open_student(args.init, teacher, args.steps)
    G, f = teacher.trainable(args, "student", folder), teacher.trainable(args, "fake")
    ema = common.EMA(G, args.ema)
    opt_G, opt_f = common.adamw(G.parameters(), args.lr, args), common.adamw(f.parameters(), args.fake_lr, args)
    parts = {"G": G, "ema": ema, "f": f, "opt_G": opt_G, "opt_f": opt_f}
    rates, heads = [(opt_G, args.lr), (opt_f, args.fake_lr)], None
    if args.loss == "adm":
        with torch.no_grad():
            maps = teacher.features(torch.zeros(1, *teacher.latent_shape, device=device), torch.ones(1, device=device), teacher.null(1))
        heads = common.Heads(maps, args.head_width).to(device)
        opt_heads = common.adamw(heads.parameters(), args.head_lr, args)
        parts |= {"heads": heads, "opt_heads": opt_heads}
        rates.append((opt_heads, args.head_lr))
    run = common.Run("adm", args, student, parts)
    G_train, f_train = common.distributed(G), common.distributed(f)
    heads_train = common.distributed(heads) if args.loss == "adm" else None
    dt = args.dt * T

    def prompts_of(rows):
        return [prompts[i] for i in rows.integers(len(prompts))]  # a row's first random number

    def all_prompts_of(step):
        batches = (common.micro_batches(args, (args.seed, step, inner), device) for inner in range(args.ttur))
        return [prompt for batch in batches for b in batch for prompt in prompts_of(b.rows)]

    for step in run.iterations(all_prompts_of):
        for optimizer, lr in rates:
            common.set_lr(optimizer, lr, step, args)
        for inner in range(args.ttur):
            generator_turn = inner == args.ttur - 1 and step >= args.warmup
            batch = common.micro_batches(args, (args.seed, step, inner), device)
            metrics = common.Means()

            # 1. Generate: x0_hat = G_theta(x_t', t', c), x_t' by backward simulation from pure noise. t' is the same on every process.
            k = int(torch.randint(student.steps, (1,), generator=common.generator(args.seed, step, inner)))
            t_prime = torch.full((args.batch,), student.times[k], dtype=torch.float64, device=device)
            for b in batch:
                b.cond = teacher.encode(prompts_of(b.rows))
                b.x_t_prime = student.simulate(G, b.rows, b.cond, k)
                # of several micro-batches the graphs would not fit together: step 3 makes them again, one by one
                with torch.set_grad_enabled(generator_turn and len(batch) == 1):
                    b.x0_hat = student.x0(G_train, b.x_t_prime, t_prime, b.cond)

            # 2. Fake score: denoise the student's samples, as the teacher was trained to
            for b in common.updating(opt_f, f_train, batch, args.clip, metrics, "norm_f"):
                x_0, t, eps = b.x0_hat.detach(), b.rows.uniform() * T, b.rows.normal(*teacher.latent_shape)
                x_t = teacher.diffuse(x_0, eps, t)
                loss_f = F.mse_loss(teacher.call(f_train, x_t, teacher.timestep(t), b.cond), teacher.target(x_0, eps, t))
                (loss_f / len(batch)).backward()
                metrics.add(loss_f=loss_f)

            # 3. Generator. The student's sample at t ~ U(dt, T], and what both scores make of it. Only G_theta learns from this.
            parts = common.updating(opt_G, G_train, batch, args.clip, metrics, "norm_G") if generator_turn else batch
            with common.frozen(f, heads), torch.set_grad_enabled(generator_turn):
                for b in parts:
                    if generator_turn and len(batch) > 1:  # step 1 kept no graph
                        b.x0_hat = student.x0(G_train, b.x_t_prime, t_prime, b.cond)
                    t = T - b.rows.uniform() * (T - dt)
                    x_t = teacher.diffuse(b.x0_hat, b.rows.normal(*teacher.latent_shape), t)
                    # the DMD loss takes both scores as they are: nothing goes back through f
                    fake = teacher.predict(f, x_t if args.loss == "adm" else x_t.detach(), t, b.cond)
                    with torch.no_grad():
                        real = teacher.guided(x_t, t, b.cond, args.guidance)
                        # DMD's direction: the baseline's gradient; for ADM its size is only logged (paper, Fig. 3)
                        direction = (fake[0] - real[0]) / (b.x0_hat - real[0]).abs().mean(tuple(range(1, x_t.ndim)), keepdim=True)
                        metrics.add(dmd_loss=0.5 * direction.square().mean())
                    if args.loss == "dmd":
                        loss_G = 0.5 * F.mse_loss(b.x0_hat, (b.x0_hat - direction).detach())
                    else:
                        # L(theta) = -E D_tau(x_fake, t - dt, c), through D's backbone, f_psi and the diffusion into G_theta
                        b.s = t - dt
                        x_fake, b.x_real = teacher.step(*fake, b.s), teacher.step(*real, b.s)
                        maps_fake = teacher.features(x_fake, b.s, b.cond)
                        loss_G = hinge_generator(heads(maps_fake))
                        b.x_fake, b.maps_fake = x_fake.detach(), [m.detach() for m in maps_fake]
                        if generator_turn:  # a gauge of D's health: does its gradient point from x_fake to x_real?
                            toward = (b.x_real - b.x_fake).flatten(1)
                            x_fake.register_hook(lambda grad: metrics.add(cosine=F.cosine_similarity(-grad.flatten(1), toward).mean()))
                    if generator_turn:
                        (loss_G / len(batch)).backward()
                        metrics.add(loss_G=loss_G)
            if generator_turn:
                ema.update()
            if args.loss == "dmd":
                continue

            # 4. Discriminator: L(tau) = E relu(1 + D(x_fake)) + E relu(1 - D(x_real)); D's maps of x_fake are at hand from step 3
            for b in common.updating(opt_heads, heads_train, batch, args.clip, metrics, "norm_D"):
                with torch.no_grad():
                    groups = [teacher.features(b.x_real, b.s, b.cond), b.maps_fake]
                    # R1, R2: lambda E (D(x) - D(x + n))^2 / |n|^2, so that grad D points along the difference of the scores
                    groups += [teacher.features(x + args.r_noise * b.rows.normal(*teacher.latent_shape), b.s, b.cond)
                               for x, weight in ((b.x_real, args.r1), (b.x_fake, args.r2)) if weight]
                D_real, D_fake, *perturbed = heads_train([torch.cat(maps) for maps in zip(*groups)]).chunk(len(groups))
                loss_D = hinge_discriminator(D_real, D_fake)
                for D, weight in ((D_real, args.r1), (D_fake, args.r2)):
                    if weight:
                        loss_D = loss_D + weight * args.dt * (D - perturbed.pop(0)).mean(1).square().mean() / args.r_noise**2
                (loss_D / len(batch)).backward()
                metrics.add(loss_D=loss_D, D_abs=torch.cat([D_real, D_fake]).abs().mean(), D_gap=D_real.mean() - D_fake.mean())

        run.log(step + 1, metrics)
        if run.due(step + 1):
            run.save(step + 1, G, ema, prompts)


if __name__ == "__main__":
    common.launch(main)
