"""Algorithm 1 and ADP once more, as plainly as they can be written: what adm.py and adp.py must equal.

Nothing is reused between updates, every formula is written out. Of the project are the networks themselves
(`teacher.call`, `encode`, `null`, `decode`, `taps`, `prediction`, heads and pixel backbone), the times of the
student, and the order of the random numbers. A micro-batch `b` is its random generator, which carries its
tensors as attributes."""

import copy
import math

import torch
import torch.nn.functional as F

from support.rng import draw_integer, make_rngs

T = 1000.0


def over(values, x):
    """values [B] -> shaped to multiply x [B, ...]."""
    return values.to(x.dtype).view(-1, *[1] * (x.ndim - 1))


def shift_of(teacher):
    config = teacher.pipe.scheduler.config
    if not config.get("use_dynamic_shifting"):
        return config.get("shift") or config.flow_shift
    tokens = math.prod(teacher.latent_shape[1:]) / 4
    slope = (config.max_shift - config.base_shift) / (config.max_image_seq_len - config.base_image_seq_len)
    return math.exp(config.base_shift + slope * (tokens - config.base_image_seq_len))


def alpha_sigma(teacher, t):
    if teacher.prediction == "flow":
        shift, u = shift_of(teacher), t / T
        sigma = shift * u / (1 + (shift - 1) * u)
        return 1 - sigma, sigma
    table = torch.cat([torch.ones(1).double(), teacher.pipe.scheduler.alphas_cumprod.double()])
    low = t.floor().long().clamp(max=999)
    abar = table[low] + (t - low) * (table[low + 1] - table[low])
    return abar.sqrt(), (1 - abar).sqrt()


def diffuse(teacher, x_0, eps, t):
    alpha, sigma = alpha_sigma(teacher, t)
    return over(alpha, x_0) * x_0 + over(sigma, x_0) * eps


def network_output(teacher, net, x, t, cond):
    _, sigma = alpha_sigma(teacher, t)
    timestep = T * sigma if teacher.prediction == "flow" else (t - 1).clamp(min=0)
    return teacher.call(net, x, timestep, cond)


def guided_output(teacher, x, t, cond, scale):
    """The real score's raw output: with classifier-free guidance, or by a network that is told the scale."""
    if type(teacher).__name__ == "Flux":
        told = cond | {"guidance": torch.full((len(x),), scale)}
        return network_output(teacher, teacher.denoiser, x, t, told)
    raw = network_output(teacher, teacher.denoiser, x, t, cond)
    null = network_output(teacher, teacher.denoiser, x, t, teacher.null(len(x)))
    guided = null + scale * (raw - null)
    if type(teacher).__name__ == "QwenImage":  # each square of 2x2 latents keeps the norm that it had
        norms = [F.avg_pool2d(part.square().sum(1, keepdim=True), 2).sqrt() for part in (raw, guided)]
        guided = guided * F.interpolate(norms[0] / norms[1], scale_factor=2)
    return guided


def both_predictions(teacher, raw, x, t):
    """x0_hat, eps_hat."""
    alpha, sigma = (over(value, x) for value in alpha_sigma(teacher, t))
    if teacher.prediction == "epsilon":
        return (x - sigma * raw) / alpha, raw
    if teacher.prediction == "flow":
        return x - sigma * raw, x + (1 - sigma) * raw
    return alpha * x - sigma * raw, sigma * x + alpha * raw


def maps_of(teacher, x, t, cond):
    """The maps at the taps, by a whole pass with hooks."""
    maps = []
    handles = []
    for module, read in teacher.taps:
        handles.append(module.register_forward_hook(lambda m, i, out, read=read: maps.append(read(out))))
    network_output(teacher, teacher.denoiser, x, t, cond)
    for handle in handles:
        handle.remove()
    return maps


def logits_of(heads, maps):
    return torch.stack([head(m) for head, m in zip(heads.heads, maps)], dim=1)


class Learner:
    """A copy of a network and a plain AdamW."""

    def __init__(self, net, lr, args):
        self.net = copy.deepcopy(net)
        options = {"lr": lr, "betas": args.betas, "weight_decay": args.weight_decay, "eps": 1e-3}
        self.parameters = [p for p in self.net.parameters() if p.requires_grad]
        self.optimizer = torch.optim.AdamW(self.parameters, **options)
        self.clip = args.clip

    def step(self, loss):
        gradients = torch.autograd.grad(loss, self.parameters)
        norm = torch.stack([gradient.square().sum() for gradient in gradients]).sum().sqrt()
        for p, gradient in zip(self.parameters, gradients):
            p.grad = gradient * min(1.0, self.clip / (norm.item() + 1e-6))
        self.optimizer.step()


class NaiveADM:
    def __init__(self, adm):
        args = adm.args
        self.args, self.teacher, self.prompts = args, adm.teacher, adm.prompts
        self.times, self.velocity = adm.student.times, adm.student.parametrisation == "velocity"
        self.G, self.f = Learner(adm.G, args.lr, args), Learner(adm.f, args.fake_lr, args)
        self.D = Learner(adm.heads, args.head_lr, args) if args.loss in ("adm", "secant") else None

    def student(self, x, t, cond):
        if self.velocity:
            return x - over(t / T, x) * self.teacher.call(self.G.net, x, t, cond)
        raw = network_output(self.teacher, self.G.net, x, t, cond)
        return both_predictions(self.teacher, raw, x, t)[0]

    def iterate(self, step):
        for update in range(self.args.ttur):
            learns = step >= self.args.warmup and update == self.args.ttur - 1
            self.update(step, update, learns)

    def update(self, step, update, learns):
        args, teacher = self.args, self.teacher
        k = draw_integer(len(self.times), "t_prime", args.seed, step, update)
        parts = make_rngs(args, teacher.device, "adm", step, update)
        for b in parts:
            b.cond = teacher.encode([self.prompts[i] for i in b.integers(len(self.prompts))])
            if args.student_guidance:
                b.cond["guidance"] = torch.full((args.batch,), args.student_guidance)
            x = b.normal(*teacher.latent_shape)
            for i in range(k):
                t, s = (torch.full((len(x),), self.times[j]).double() for j in (i, i + 1))
                with torch.no_grad():
                    x_0 = self.student(x, t, b.cond)
                eps = b.normal(*teacher.latent_shape)
                r = over(s / T, x)
                x = (1 - r) * x_0 + r * eps if self.velocity else diffuse(teacher, x_0, eps, s)
            b.x, b.t_prime = x, torch.full((len(x),), self.times[k]).double()
            b.x_0 = self.student(x, b.t_prime, b.cond)

        loss_f = 0
        for b in parts:
            x_0, t, eps = b.x_0.detach(), b.uniform() * T, b.normal(*teacher.latent_shape)
            raw = network_output(teacher, self.f.net, diffuse(teacher, x_0, eps, t), t, b.cond)
            alpha, sigma = (over(value, x_0) for value in alpha_sigma(teacher, t))
            target = {"flow": eps - x_0, "epsilon": eps}.get(teacher.prediction, alpha * eps - sigma * x_0)
            loss_f = loss_f + (raw - target).square().mean() / len(parts)
        self.f.step(loss_f)

        loss_G = 0
        for b in parts:
            last = args.t_range[1] * T
            b.t = last - b.uniform() * (last - max(args.dt, args.t_range[0]) * T)
            x_t = diffuse(teacher, b.x_0, b.normal(*teacher.latent_shape), b.t)
            raw = network_output(teacher, self.f.net, x_t, b.t, b.cond)
            fake_0, fake_eps = both_predictions(teacher, raw, x_t, b.t)
            with torch.no_grad():
                guided = guided_output(teacher, x_t, b.t, b.cond, args.guidance)
                real_0, real_eps = both_predictions(teacher, guided, x_t, b.t)
            b.s = b.t - args.dt * T
            b.x_fake = diffuse(teacher, fake_0, fake_eps, b.s)
            if args.straight_through:
                b.x_fake = b.x_fake.detach() + x_t - x_t.detach()
            b.x_real = diffuse(teacher, real_0, real_eps, b.s)
            if args.loss == "secant":
                loss_G = loss_G + self.secant(b) / len(parts)
            elif args.loss == "line":
                difference = (b.x_real - b.x_fake).detach() / args.dt
                loss_G = loss_G - (difference * b.x_fake).mean() / len(parts)
            elif self.D:
                maps = maps_of(teacher, b.x_fake, b.s, b.cond)
                loss = -logits_of(self.D.net, maps).mean() / len(parts)
                loss_G = loss_G + (self.project(loss, b) if args.project else loss)
            else:
                size = (b.x_0 - real_0).abs().flatten(1).mean(1)
                gradient = ((fake_0 - real_0) / over(size, fake_0)).detach()
                # the loss whose gradient in x_0 is the direction over the number of elements
                loss_G = loss_G + (b.x_0 * gradient).mean() / len(parts)
        if learns:
            self.G.step(loss_G)
        if not self.D:
            return

        loss_D = 0
        for b in parts:
            logits = []
            for x, sign, weight in ((b.x_real, 1, args.r1), (b.x_fake, -1, args.r2)):
                x = x.detach()
                D = logits_of(self.D.net, maps_of(teacher, x, b.s, b.cond))
                logits.append((x, D, weight))
                loss_D = loss_D + (1 - sign * D).clamp(min=0).mean() / len(parts)
            for x, D, weight in logits:
                n = b.normal(*teacher.latent_shape)
                near = logits_of(self.D.net, maps_of(teacher, x + args.r_noise * n, b.s, b.cond))
                slope = ((D.mean(1) - near.mean(1)) / args.r_noise).square().mean()
                loss_D = loss_D + weight * n[0].numel() * args.dt * slope / len(parts)
        self.D.step(loss_D)

    def secant(self, b):
        """Row by row x_fake's place on the line to x_real, times D's mean slope on that line."""
        values = []
        for i, (x_fake, x_real) in enumerate(zip(b.x_fake, b.x_real)):
            cond = {name: value[i : i + 1] for name, value in b.cond.items()}
            D = []
            for x in (x_fake.detach(), x_real):
                maps = maps_of(self.teacher, x[None], b.s[i : i + 1], cond)
                D.append(logits_of(self.D.net, maps).mean().item())
            line = (x_real - x_fake).detach()
            values.append(-(D[1] - D[0]) / line.norm() * (x_fake * line / line.norm()).sum())
        return sum(values) / len(values)

    @staticmethod
    def project(loss, b):
        """A loss whose gradient in x_fake is the part along x_real - x_fake of this one's."""
        (gradient,) = torch.autograd.grad(loss, b.x_fake, retain_graph=True)
        parts = []
        for x_fake, x_real, g in zip(b.x_fake, b.x_real, gradient):
            line = (x_real - x_fake).detach()
            slope = (g * line).sum() / line.square().sum()
            parts.append((slope * line * x_fake).sum())
        return sum(parts)


class NaiveADP:
    def __init__(self, adp):
        self.args, self.teacher, self.pairs, self.backbone = adp.args, adp.teacher, adp.pairs, adp.backbone
        self.G = Learner(adp.G, adp.args.lr, adp.args)
        self.D = Learner(adp.heads, adp.args.head_lr, adp.args)

    def judge(self, x_0, eps, t, cond):
        """The logits of the latent heads and of the pixel heads."""
        maps = maps_of(self.teacher, diffuse(self.teacher, x_0, eps, t), t, cond)
        latent = len(maps)
        if self.backbone:
            maps = maps + self.backbone.features(self.teacher.decode(x_0))
        logits = logits_of(self.D.net, maps)
        return logits[:, :latent], logits[:, latent:]

    def weigh(self, latent, pixel):
        value = self.args.lambda_latent * latent.mean()
        return value + self.args.lambda_pixel * pixel.mean() if pixel.numel() else value

    def iterate(self, step):
        args, teacher = self.args, self.teacher
        parts = make_rngs(args, teacher.device, "adp", step)
        loss_G = 0
        for b in parts:
            numbers = b.integers(len(self.pairs))
            x_T, b.x_0 = self.pairs.batch(numbers)
            prompts = self.pairs.prompts(numbers)
            b.cond = teacher.encode(prompts)
            u = b.uniform()
            t = (1 - (u if args.time_power == 1 else u * u * u)) * T
            r = over(t / T, x_T)
            x_t = (1 - r) * b.x_0 + r * x_T
            velocity = teacher.call(self.G.net, x_t, t, b.cond)
            error = (velocity - (x_T - b.x_0)).square().mean()
            if step < args.warmup:
                loss_G = loss_G + error / len(parts)
                continue
            b.fake = x_t - r * velocity
            b.t = b.uniform() * T
            b.eps = b.normal(*teacher.latent_shape)
            value = self.weigh(*self.judge(b.fake, b.eps, b.t, b.cond))
            loss_G = loss_G + (args.mse * error - value) / len(parts)
        self.G.step(loss_G)
        if step < args.warmup:
            return
        loss_D = 0
        for b in parts:
            fake = self.judge(b.fake.detach(), b.eps, b.t, b.cond)
            real = self.judge(b.x_0, b.normal(*teacher.latent_shape), b.t, b.cond)
            loss_D = loss_D + self.weigh(*[(1 + D).clamp(min=0) for D in fake]) / len(parts)
            loss_D = loss_D + self.weigh(*[(1 - D).clamp(min=0) for D in real]) / len(parts)
        self.D.step(loss_D)
