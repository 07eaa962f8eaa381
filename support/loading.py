"""Loads a pipeline so that no weight is missing, made up, left over, or not a number."""

import contextlib
import dataclasses
import inspect
import logging
import os
import re
import textwrap

import torch
from torch import nn

from support.configs import check_configs, choose_classes, describe_sampler
from support.errors import UserError, is_of_machine, note
from support.hub import TEACHERS, is_hub_id, is_offline
from support.offload import InTurn, at_work, decode_in_tiles
from support.parallel import list_float32_parts
from support.tensors import is_finite

# What files may have beside a network's own weights: tables that it computes, and parts that its class
# leaves out.
SURPLUS = re.compile(
    r"position_ids|pos_embed(ding)?|inv_freq|embed_tokens\.weight|logit_scale"
    r"|^(text_model\.)?(decoder|vision_model|visual_projection|text_projection|lm_head|classifier)\b"
)


def find_teacher(name):
    """A known name, a pipeline folder or a hub id -> the folder or hub id. UserError for any other name."""
    path = TEACHERS.get(name, name)
    if os.path.isfile(path):
        raise UserError(
            f"--teacher {name} is a single file: make a folder of it, by diffusers' from_single_file and "
            "save_pretrained, and give that"
        )
    if not os.path.isdir(path) and not is_hub_id(path):
        raise UserError(
            f"there is no teacher {name!r}: give --teacher one of {', '.join(TEACHERS)}, a pipeline folder, "
            f"or a hub id as {TEACHERS['sdxl']}"
        )
    return path


def describe_teacher(name):
    """A teacher as the command line names it -> as a run's files name it: a folder by its absolute path."""
    return os.path.abspath(name) if os.path.isdir(name) else name


def name_both(teacher, lora):
    """A teacher's name and that of the file of --teacher-lora, or None, in words."""
    return f"{teacher} with {lora}" if lora else teacher


@dataclasses.dataclass
class Description:
    """What a teacher's JSON files say, all of it honoured."""

    pipeline: str  # its class
    classes: dict  # {component: class, or None where it is absent}
    switches: dict  # the pipeline's own, {name: bool}
    configs: dict  # {component: config, as in its file} of scheduler, denoiser and VAE
    scheduler: object  # made of its config


def read_teacher(name, path):
    """A pipeline folder or hub id -> its Description, without any weights. name: for messages.

    UserError for what is missing or damaged, and for what is not honoured here."""
    import diffusers

    offline = is_out_of_reach(path)
    try:
        index = check_object(diffusers.DiffusionPipeline.load_config(path, local_files_only=offline))
    except Exception as error:  # as below: the libraries raise many kinds for what is missing or damaged
        raise report(name, path, error) from error
    classes, switches = choose_classes(name, index)
    configs = {}
    for part in ("scheduler", "unet", "transformer", "vae"):
        if part in classes:
            configs[part] = read_config(classes[part], path, part, offline)
    check_configs(name, index["_class_name"], configs, classes)
    for part, config in configs.items():
        config["_class_name"] = classes[part].__name__  # as in the pipeline, model_index.json's counts
    try:
        scheduler = classes["scheduler"].from_config(configs["scheduler"])
    except Exception as error:
        raise UserError(f"{path}/scheduler cannot be loaded: {shorten(error)}") from error
    return Description(index["_class_name"], classes, switches, configs, scheduler)


def load_pipeline(name, path, dtype, variant=None):
    """A teacher's pipeline, folder or hub id -> (the diffusers pipeline, its folder).

    UserError for what `read_teacher` refuses, before weights are fetched, and for weights that are not those
    of the config's network. variant: as in diffusion_pytorch_model.VARIANT.safetensors."""
    import diffusers
    import transformers

    for library in (diffusers, transformers):
        library.utils.logging.disable_progress_bar()
    teacher = read_teacher(name, path)
    pipeline = getattr(diffusers, teacher.pipeline)
    # else it tells of each text that is too long, on every rank
    diffusers.utils.logging.get_logger(pipeline.__module__).setLevel(logging.ERROR)
    folder = fetch_folder(name, path, variant)
    if variant and not any(variant in list_variants(os.path.join(folder, part)) for part in teacher.classes):
        raise UserError(f"the teacher {name!r} has no weights of --variant {variant}")
    parts = {"scheduler": teacher.scheduler}
    for part, kind in teacher.classes.items():
        if part not in parts:
            parts[part] = load_part(kind, folder, part, dtype, variant) if kind else None
    check_vocabularies(name, parts)
    other = describe_sampler(teacher.pipeline, teacher.classes["scheduler"], teacher.configs["scheduler"])
    if other:
        note(
            f"the pipeline of {name} samples with {other}; as a teacher it takes DDIM's steps (a flow: "
            "Euler's) along the same schedule"
        )
    return assemble(pipeline, parts, teacher.switches), folder


def assemble(pipeline, parts, switches):
    """A diffusers pipeline of this class: the components that it wants but that are not there are None."""
    wanted = inspect.signature(pipeline).parameters
    if "requires_safety_checker" in wanted:
        switches = {**switches, "requires_safety_checker": False}
    absent = [part for part, parameter in wanted.items() if parameter.default is parameter.empty]
    return pipeline(**{**dict.fromkeys(absent), **parts}, **switches)


def fetch_folder(name, path, variant):
    """A pipeline folder or hub id -> the folder; what the hub has is fetched to its cache."""
    from diffusers import DiffusionPipeline

    if os.path.isdir(path):
        return path
    try:
        return DiffusionPipeline.download(path, variant=variant, local_files_only=is_offline())
    except Exception as error:
        raise report(name, path, error) from error


def is_out_of_reach(path):
    """Whether a hub id can be looked for in the cache alone."""
    return not os.path.isdir(path) and is_offline()


def report(name, path, error):
    """The UserError for a teacher that is not there."""
    where = "" if name == path else f" from {path}"
    reason = shorten(error)
    if is_out_of_reach(path):
        reason = (
            "it is no folder here, nor in the hub's cache, and the hub cannot be reached; "
            "give the folder of a pipeline"
        )
    elif not os.path.isdir(path):
        reason = f"it is no folder here, and on the hub: {reason}"
    return UserError(f"the teacher {name!r} could not be loaded{where}: {reason}")


def read_config(kind, path, part, offline=False):
    """A component's config, as in its file. UserError where it is missing or damaged."""
    try:
        return check_object(kind.load_config(path, subfolder=part, local_files_only=offline))
    except Exception as error:
        raise UserError(f"the config in {path}/{part} cannot be read: {shorten(error)}") from error


def check_object(config):
    """What a JSON file holds. ValueError where that is no object."""
    if not isinstance(config, dict):
        raise ValueError("it is no JSON object")
    return config


def load_part(kind, folder, part, dtype, variant=None):
    """A component of a class of diffusers or transformers. UserError for what is missing or damaged."""
    if issubclass(kind, nn.Module):
        return load_network(kind, folder, part, dtype, variant)
    if part.startswith("tokenizer"):
        check_vocabulary_files(folder, part)
    try:
        loaded = kind.from_pretrained(folder, subfolder=part, local_files_only=True)
        if part.startswith("tokenizer"):
            loaded("a")  # some find out here that their vocabulary is not there
    except Exception as error:
        reason = shorten(error)
        if any(word in reason.lower() for word in ("sentencepiece", "protobuf", "tiktoken")):
            reason = "it is a T5 tokenizer that needs two more packages: pip install sentencepiece protobuf"
        raise UserError(f"{folder}/{part} cannot be loaded: {reason}") from error
    if kind.__name__.startswith("CLIPTokenizer") and loaded.model_max_length > 2**20:
        raise UserError(f"{folder}/{part}/tokenizer_config.json does not say what model_max_length is")
    return loaded


def check_vocabularies(name, parts):
    """UserError for a tokenizer with words that its text encoder does not know. parts: {component: it}."""
    for part, encoder in parts.items():
        if part.startswith("text_encoder") and encoder is not None:
            tokenizer = part.replace("text_encoder", "tokenizer")
            words = len(parts[tokenizer])
            known = encoder.config.get_text_config().vocab_size
            if words > known:
                raise UserError(
                    f"the teacher {name} cannot be used: its {tokenizer} has {words} words, "
                    f"its {part} {known}"
                )


def check_vocabulary_files(folder, part):
    """UserError for a tokenizer without a vocabulary, of which transformers would make an empty one."""
    place = os.path.join(folder, part)
    kinds = (("tokenizer.json",), ("vocab.json", "merges.txt"), ("spiece.model",))
    there = set(os.listdir(place)) if os.path.isdir(place) else set()
    if not any(there.issuperset(files) for files in kinds):
        raise UserError(
            f"{place} has no vocabulary: no tokenizer.json, nor vocab.json and merges.txt, nor spiece.model"
        )


def load_network(kind, folder, part, dtype, variant=None, local=True):
    """A network of this class of diffusers or transformers, whole and finite, or a UserError.

    As in diffusers, a component that has no files of the variant is read from the others. local: the hub is
    not asked."""
    place = os.path.join(folder, part) if part else folder
    variants = list_variants(place)
    try:
        with quiet():
            net, found = kind.from_pretrained(
                folder,
                subfolder=part,
                dtype=dtype,
                variant=variant if variant in variants else None,
                output_loading_info=True,
                local_files_only=local,
            )
    except Exception as error:
        reason = shorten(error)
        if variants and "no file named" in reason:
            names = " or ".join(variants)
            reason = f"there are only those of --variant {names}"
        raise UserError(f"the weights in {place} cannot be loaded: {reason}") from error
    missing = sorted(found["missing_keys"])
    if missing:
        raise UserError(f"the weights in {place} are not all there: {missing[0]} is missing")
    left = sorted(name for name in found["unexpected_keys"] if not SURPLUS.search(name))
    if left:
        raise UserError(f"the weights in {place} do not fit its config: {left[0]} is left over")
    for name, weight in net.named_parameters():
        if not is_finite(weight):
            raise UserError(f"the weights in {place} are damaged: {name} is not finite")
    return net


@contextlib.contextmanager
def quiet():
    """Inside, diffusers and transformers write nothing, at whatever length they would: what went wrong is
    said by the caller."""
    import diffusers
    import transformers

    libraries = [library.utils.logging for library in (diffusers, transformers)]
    levels = [library.get_verbosity() for library in libraries]
    for library in libraries:
        library.set_verbosity(logging.CRITICAL)
    try:
        yield
    finally:
        for library, level in zip(libraries, levels):
            library.set_verbosity(level)


def list_variants(folder):
    """The variants of the weights in a folder: "fp16" for model.fp16.safetensors or .bin, and for shards."""
    names = os.listdir(folder) if os.path.isdir(folder) else []
    found = {re.fullmatch(r"\w+\.(\w+)(-\d+-of-\d+)?\.(safetensors|bin)", name) for name in names}
    return sorted({match[1] for match in found if match})


def list_networks(pipe):
    """{name: network} of a pipeline's components."""
    return {name: part for name, part in pipe.components.items() if isinstance(part, torch.nn.Module)}


def lower_precision(net, dtype):
    """A float32 network in another precision, as from_pretrained would have read it: some parts of Wan's
    stay in float32, and so does what no file has, tables of positions."""
    kept = list_float32_parts(net)
    for name, weight in net.state_dict(keep_vars=True).items():
        if weight.is_floating_point() and name not in kept:
            weight.data = weight.data.to(dtype)
    return net


def place(teacher, in_turn=False):
    """Moves a teacher's networks to its device, `in_turn` only while they are at work, and tries it out ->
    the teacher."""
    networks = list_networks(teacher.pipe)
    if in_turn:
        names = networks.keys() - {teacher.denoiser_name}
        teacher.offload = InTurn(teacher.pipe, names, teacher._encode, teacher.device)
        decode_in_tiles(teacher)
        teacher.null(1)  # before a denoiser is at work
    else:
        for module in networks.values():
            module.to(teacher.device)
    try_out(teacher)
    return teacher


@torch.no_grad()
def try_out(teacher):
    """UserError for parts that do not fit together: one prediction of the empty prompt's picture."""
    t = torch.tensor(teacher.student_times(1), dtype=torch.float64, device=teacher.device)
    try:
        x = torch.zeros(1, *teacher.latent_shape, device=teacher.device)
        cond = teacher.encode([""])
        with at_work(teacher, teacher.denoiser):
            raw = teacher.raw(teacher.denoiser, x, t, cond)
    except Exception as error:  # of many kinds, as parts can misfit in many ways
        if is_of_machine(error):
            raise
        reason = shorten(error)
        raise UserError(f"the parts of the teacher {teacher.path} do not fit together: {reason}") from error
    if raw.shape != x.shape or not raw.isfinite().all():
        raise UserError(f"the teacher {teacher.path} cannot be used: its predictions are no finite latents")


def shorten(error):
    """The first sentence of an error's message, in one line."""
    line = " ".join(str(error).split()) or type(error).__name__
    return textwrap.shorten(re.split(r"\. (?=[A-Z])", line)[0], 300)


def load_dinov2(name):
    """DINOv2, a transformers folder or hub id -> its network, float32. UserError for any other network."""
    from transformers import AutoModel

    check_dinov2(name)
    local = is_out_of_reach(name) or os.path.isdir(name)
    return load_network(AutoModel, name, "", torch.float32, local=local)


def check_dinov2(name):
    """UserError where there is none of this name, by its config alone."""
    from transformers import AutoConfig

    offline = is_out_of_reach(name)
    try:
        config = AutoConfig.from_pretrained(name, local_files_only=offline or os.path.isdir(name))
    except Exception as error:
        reason = "it is no folder here, and the hub cannot be reached" if offline else shorten(error)
        raise UserError(f"the pixel backbone {name!r} could not be loaded: {reason}") from error
    if not config.model_type.startswith("dinov2"):
        raise UserError(f"the pixel backbone {name!r} is a {config.model_type}; known are SAM and DINOv2")
