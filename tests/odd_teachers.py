"""Odd teachers: how each is made of a tiny pipeline, and what is to be said of it."""

import json
import os
import pickle
import shutil
from collections.abc import Callable
from dataclasses import dataclass

import torch
from safetensors.torch import load_file, save_file

RIGHT = "right"  # the teacher computes what its own diffusers pipeline does


@dataclass
class Odd:
    name: str
    family: str  # of the tiny pipeline, one of FAMILIES in tests/test_teachers.py
    change: Callable  # changes the pipeline's folder
    expected: str  # RIGHT, or words of the one sentence that refuses it


INDEX = "model_index.json"
SCHEDULER = "scheduler/scheduler_config.json"
VAE = "vae/config.json"
UNET = "unet/config.json"
TRANSFORMER = "transformer/config.json"

# Changes: each is a function of the folder ----------------------------------------------------------------


def edit(file, **fields):
    """Sets fields of a JSON file."""

    def change(folder):
        path = os.path.join(folder, file)
        with open(path) as opened:
            config = json.load(opened)
        with open(path, "w") as opened:
            json.dump(config | fields, opened)

    return change


def take_out(file, *fields):
    """Takes fields out of a JSON file."""

    def change(folder):
        path = os.path.join(folder, file)
        with open(path) as opened:
            config = json.load(opened)
        for field in fields:
            del config[field]
        with open(path, "w") as opened:
            json.dump(config, opened)

    return change


def all_of(*changes):
    def change(folder):
        for part in changes:
            part(folder)

    return change


def set_scheduler(name, **fields):
    """A scheduler of another class, with the fields of the one before and these."""
    named = edit(INDEX, scheduler=["diffusers", name])
    return all_of(named, edit(SCHEDULER, _class_name=name, **fields))


def replace_scheduler(name, **fields):
    """A scheduler of another class, with these fields alone."""

    def write(folder):
        with open(os.path.join(folder, SCHEDULER), "w") as opened:
            json.dump({"_class_name": name, **fields}, opened)

    return all_of(edit(INDEX, scheduler=["diffusers", name]), write)


def write(file, content):
    def change(folder):
        with open(os.path.join(folder, file), "wb") as opened:
            opened.write(content)

    return change


def truncate(file, size):
    return lambda folder: os.truncate(os.path.join(folder, file), size)


def delete(*files):
    def change(folder):
        for file in files:
            path = os.path.join(folder, file)
            shutil.rmtree(path) if os.path.isdir(path) else os.remove(path)

    return change


def put_folder(file):
    """A folder in a file's place."""

    def change(folder):
        os.remove(os.path.join(folder, file))
        os.mkdir(os.path.join(folder, file))

    return change


def rename(before, after):
    return lambda folder: os.rename(os.path.join(folder, before), os.path.join(folder, after))


def change_weights(file, function):
    """function: changes the state_dict in its place."""

    def change(folder):
        path = os.path.join(folder, file)
        state = load_file(path)
        function(state)
        save_file(state, path, metadata={"format": "pt"})

    return change


class Code:
    """What a pickle must not run."""

    def __reduce__(self):
        return os._exit, (99,)


def put_pickle(weights, pickled):
    """A pickle with code in the place of a safetensors file."""
    return all_of(delete(weights), write(pickled, pickle.dumps(Code())))


def put_tensors(weights, pickled):
    """The same weights as torch's own file, which is read without unpickling."""

    def change(folder):
        path = os.path.join(folder, weights)
        torch.save(load_file(path), os.path.join(folder, pickled))
        os.remove(path)

    return change


def add_words(file, count):
    """Adds so many tokens to a tokenizer."""

    def change(folder):
        path = os.path.join(folder, file)
        with open(path) as opened:
            config = json.load(opened)
        last = max(token["id"] for token in config["added_tokens"])
        for number in range(count):
            like = config["added_tokens"][0]
            config["added_tokens"].append({**like, "id": last + 100 + number, "content": f"<word{number}>"})
        with open(path, "w") as opened:
            json.dump(config, opened)

    return change


UNET_WEIGHTS = "unet/diffusion_pytorch_model.safetensors"
VAE_WEIGHTS = "vae/diffusion_pytorch_model.safetensors"
TEXT_WEIGHTS = "text_encoder/model.safetensors"
SCALED = {"beta_start": 0.00085, "beta_end": 0.02, "beta_schedule": "scaled_linear"}
ZERO_SNR = {"rescale_betas_zero_snr": True}
EPSILON_AT_ZERO = "predicts noise (prediction_type: epsilon) at zero terminal SNR"
MEAN = [1.0, -2.0, 3.0, 0.5]
STD = [0.5, 2.0, 1.5, 0.8]
DIFFUSION = (
    "CogVideoXDPMScheduler",
    "DDPMScheduler",
    "DPMSolverMultistepScheduler",
    "DPMSolverSinglestepScheduler",
    "PNDMScheduler",
    "UniPCMultistepScheduler",
)
OF_ANOTHER_KIND = (
    "CMStochasticIterativeScheduler",
    "DDIMInverseScheduler",
    "EDMDPMSolverMultistepScheduler",
    "EDMEulerScheduler",
    "FlowMatchEulerDiscreteScheduler",
    "IPNDMScheduler",
    "LCMScheduler",
    "NoSuchScheduler",
    "RePaintScheduler",
    "SCMScheduler",
    "TCDScheduler",
    "UnCLIPScheduler",
)


def list_scheduler_classes():
    odd = []
    for name in DIFFUSION:
        family = "cogvideox" if name.startswith("CogVideoX") else "sdxl"
        odd.append(Odd(f"{family}: {name}", family, set_scheduler(name), RIGHT))
    for name in OF_ANOTHER_KIND:
        words = f'"{name}"], known is CogVideoXDDIMScheduler or'
        odd.append(Odd(f"sdxl: {name}", "sdxl", set_scheduler(name), words))
    for name in ("DDPMScheduler", "FlowMatchLCMScheduler", "UniPCMultistepScheduler"):
        odd.append(Odd(f"sd3: {name}", "sd3", set_scheduler(name), f'"{name}"], known is FlowMatch'))
    return odd


def of_class(pipeline, why):
    """A pipeline of this class, which is refused."""
    return Odd(pipeline, "sdxl", edit(INDEX, _class_name=pipeline), why)


def refused(family, file, field, value, why=""):
    """A value of a field that is refused by name."""
    shown = json.dumps(value)
    return Odd(
        f"{family}: {field} {shown[:40]}", family, edit(file, **{field: value}), f"{field}: {shown}, {why}"
    )


ODD = [
    # schedules
    *list_scheduler_classes(),
    Odd("Euler, trailing", "sdxl", set_scheduler("EulerDiscreteScheduler"), RIGHT),
    Odd("Euler, bare", "sdxl", replace_scheduler("EulerDiscreteScheduler", **SCALED), RIGHT),
    Odd(
        "as the real SDXL's",
        "sdxl",
        set_scheduler(
            "EulerDiscreteScheduler",
            timestep_spacing="leading",
            steps_offset=1,
            set_alpha_to_one=False,
            skip_prk_steps=True,
            interpolation_type="linear",
            use_karras_sigmas=False,
        ),
        RIGHT,
    ),
    Odd("leading steps", "sdxl", edit(SCHEDULER, timestep_spacing="leading", steps_offset=1), RIGHT),
    Odd("linspace steps", "sdxl", edit(SCHEDULER, timestep_spacing="linspace"), RIGHT),
    Odd("v prediction", "sdxl", edit(SCHEDULER, prediction_type="v_prediction"), RIGHT),
    Odd("no prediction_type", "sdxl", take_out(SCHEDULER, "prediction_type"), RIGHT),
    Odd("linear betas", "sdxl", edit(SCHEDULER, beta_schedule="linear"), RIGHT),
    Odd("trained_betas", "sdxl", edit(SCHEDULER, trained_betas=[0.01] * 1000), RIGHT),
    Odd("Karras's sigmas", "sdxl", set_scheduler("HeunDiscreteScheduler", use_karras_sigmas=True), RIGHT),
    Odd("v at zero SNR", "sdxl", edit(SCHEDULER, prediction_type="v_prediction", **ZERO_SNR), RIGHT),
    Odd(
        "v at Euler's zero SNR",
        "sdxl",
        set_scheduler("EulerDiscreteScheduler", prediction_type="v_prediction", **ZERO_SNR),
        RIGHT,
    ),
    Odd("no SNR shift", "cogvideox", edit(SCHEDULER, snr_shift_scale=1.0), RIGHT),
    Odd("SNR above zero", "cogvideox", edit(SCHEDULER, rescale_betas_zero_snr=False), RIGHT),
    Odd("epsilon at zero SNR", "sdxl", edit(SCHEDULER, **ZERO_SNR), EPSILON_AT_ZERO),
    Odd(
        "epsilon at Euler's zero SNR",
        "sdxl",
        set_scheduler("EulerDiscreteScheduler", **ZERO_SNR),
        EPSILON_AT_ZERO,
    ),
    Odd(
        "epsilon at DPM's zero SNR",
        "sdxl",
        set_scheduler("DPMSolverMultistepScheduler", **ZERO_SNR),
        EPSILON_AT_ZERO,
    ),
    Odd("epsilon, cosine betas", "sdxl", edit(SCHEDULER, beta_schedule="squaredcos_cap_v2"), EPSILON_AT_ZERO),
    Odd(
        "zero SNR unread",
        "sdxl",
        set_scheduler("PNDMScheduler", **ZERO_SNR),
        "rescale_betas_zero_snr: true, which a PNDMScheduler does not read",
    ),
    Odd(
        "SNR shift unread",
        "cogvideox",
        set_scheduler("DDIMScheduler"),
        "snr_shift_scale: 3.0, which a DDIMScheduler does not read",
    ),
    Odd("betas above 1", "sdxl", edit(SCHEDULER, beta_end=1.5), EPSILON_AT_ZERO),
    Odd("betas below 0", "sdxl", edit(SCHEDULER, trained_betas=[-0.01] * 1000), "no noise schedule of 1000"),
    Odd(
        "short trained_betas", "sdxl", edit(SCHEDULER, trained_betas=[0.01] * 9), "no noise schedule of 1000"
    ),
    Odd(
        "two classes",
        "cogvideox",
        edit(SCHEDULER, _class_name="EDMEulerScheduler"),
        '_class_name: "EDMEulerScheduler", known with CogVideoXPipeline',
    ),
    refused("sdxl", SCHEDULER, "num_train_timesteps", 500, "known here is 1000"),
    refused("sdxl", SCHEDULER, "num_train_timesteps", "1000", "known here is 1000"),
    refused("sd3", SCHEDULER, "num_train_timesteps", 500, "known here is 1000"),
    refused("sdxl", SCHEDULER, "prediction_type", "sample", 'known here is "epsilon" or "v_prediction"'),
    refused("sdxl", SCHEDULER, "prediction_type", "flow_prediction"),
    refused("sdxl", SCHEDULER, "prediction_type", None),
    refused("sdxl", SCHEDULER, "clip_sample", True),
    Odd(
        "no clip_sample",
        "sdxl",
        replace_scheduler("DDIMScheduler", **SCALED),
        "clip_sample: true, a DDIMScheduler's default, known here is false or null",
    ),
    Odd(
        "SD without clip_sample",
        "stable-diffusion",
        replace_scheduler("DDIMScheduler", **SCALED, set_alpha_to_one=False, steps_offset=1),
        RIGHT,
    ),
    refused("sdxl", SCHEDULER, "thresholding", True),
    refused("sdxl", SCHEDULER, "timestep_spacing", "karras"),
    refused("sdxl", SCHEDULER, "steps_offset", 7),
    refused("sdxl", SCHEDULER, "beta_start", "0.1", "which is of the wrong type"),
    refused("sdxl", SCHEDULER, "sigma_data", 0.5, "a field of which nothing is known here"),
    Odd(
        "beta_schedule of another library", "sdxl", edit(SCHEDULER, beta_schedule="sqrt"), "cannot be loaded"
    ),
    Odd(
        "flow sigmas",
        "sdxl",
        set_scheduler("UniPCMultistepScheduler", use_flow_sigmas=True),
        "use_flow_sigmas: true",
    ),
    Odd(
        "continuous timesteps",
        "sdxl",
        set_scheduler("EulerDiscreteScheduler", timestep_type="continuous"),
        'timestep_type: "continuous"',
    ),
    Odd(
        "learned variance",
        "sdxl",
        set_scheduler("DDPMScheduler", variance_type="learned_range"),
        'variance_type: "learned_range"',
    ),
    refused("sd3", SCHEDULER, "use_dynamic_shifting", True),
    Odd("shift 1", "sd3", edit(SCHEDULER, shift=1.0), RIGHT),
    Odd("Heun's flow", "sd3", replace_scheduler("FlowMatchHeunDiscreteScheduler", shift=2.0), RIGHT),
    refused("sd3", SCHEDULER, "shift", 0, "it must be above 0"),
    refused("sd3", SCHEDULER, "shift", None, "which is of the wrong type"),
    refused("sd3", SCHEDULER, "invert_sigmas", True),
    refused("sd3", SCHEDULER, "prediction_type", "epsilon"),
    refused("wan", SCHEDULER, "flow_shift", 0.0, "it must be above 0"),
    refused("wan", SCHEDULER, "prediction_type", "v_prediction"),
    refused("wan", SCHEDULER, "use_flow_sigmas", False),
    # relatives of known families
    Odd(
        "Wan 2.2 A14B",
        "wan",
        edit(INDEX, transformer_2=["diffusers", "WanTransformer3DModel"], boundary_ratio=0.875),
        "a second network for low noise, as Wan 2.2 A14B has",
    ),
    Odd("half of a Wan 2.2 A14B", "wan", edit(INDEX, boundary_ratio=0.875), "boundary_ratio: 0.875"),
    refused("wan", "transformer/config.json", "image_dim", 1280),
    refused("wan", VAE, "latents_std", [1.0], "it must be a number for each of the latents' channels"),
    refused("wan", VAE, "z_dim", 16, "but the denoiser's in_channels are 4"),
    refused("flux", "transformer/config.json", "guidance_embeds", False, "known here is true"),
    refused("flux", SCHEDULER, "time_shift_type", "linear"),
    of_class("WanImageToVideoPipeline", "starts from a picture or a video"),
    of_class("FluxKontextPipeline", "starts from a picture or a video"),
    of_class("FluxFillPipeline", "starts from a picture or a video"),
    of_class("QwenImageEditPipeline", "starts from a picture or a video"),
    of_class("Flux2Pipeline", "of FLUX.2, which is not supported"),
    of_class("Flux2KleinPipeline", "of FLUX.2, which is not supported"),
    # autoencoders
    Odd("SDXL's latents_mean and latents_std", "sdxl", edit(VAE, latents_mean=MEAN, latents_std=STD), RIGHT),
    Odd("SDXL's scaling_factor", "sdxl", edit(VAE, scaling_factor=0.13), RIGHT),
    Odd("SD3's shift_factor", "sd3", edit(VAE, scaling_factor=1.5, shift_factor=0.3), RIGHT),
    Odd("CogVideoX's scaling_factor", "cogvideox", edit(VAE, scaling_factor=0.7), RIGHT),
    refused("sdxl", VAE, "latents_mean", MEAN, "but no latents_std"),
    refused("sdxl", VAE, "latents_std", STD, "but no latents_mean"),
    refused("sdxl", VAE, "shift_factor", 0.1, "known here is null or 0"),
    refused("sd3", VAE, "latents_mean", MEAN, "known here is null"),
    refused("cogvideox", VAE, "latents_std", STD, "known here is null"),
    refused("cogvideox", VAE, "shift_factor", 0.1, "known here is null or 0"),
    refused("cogvideox", VAE, "invert_scale_latents", True),
    refused("cogvideox", VAE, "temporal_compression_ratio", 8),
    refused("sdxl", VAE, "scaling_factor", 0, "it must be a number above 0"),
    refused("sdxl", VAE, "scaling_factor", "0.5", "which is of the wrong type"),
    refused("sdxl", VAE, "scaling_factor", None, "which is of the wrong type"),
    refused("sd3", VAE, "shift_factor", "0.1", "it must be a number"),
    refused("sdxl", VAE, "latent_channels", 16, "but the denoiser's in_channels are 4"),
    refused("sdxl", VAE, "out_channels", 4),
    Odd(
        "short latents_mean",
        "sdxl",
        edit(VAE, latents_mean=[0.1], latents_std=STD),
        "it must be a number for each of the latents' channels",
    ),
    Odd(
        "another autoencoder",
        "sdxl",
        edit(INDEX, vae=["diffusers", "AutoencoderTiny"]),
        "known is AutoencoderKL",
    ),
    # denoisers
    Odd(
        "inpainting's channels",
        "sdxl",
        edit(UNET, in_channels=9),
        "out_channels: 4, not the 9 of in_channels",
    ),
    refused("sdxl", UNET, "out_channels", 8, "not the 4 of in_channels"),
    refused("sdxl", UNET, "addition_embed_type", None, 'known here is "text_time"'),
    refused("sdxl", UNET, "addition_embed_type", "text"),
    refused("sdxl", UNET, "class_embed_type", "timestep"),
    refused("sdxl", UNET, "num_class_embeds", 10),
    refused("sdxl", UNET, "time_cond_proj_dim", 256),
    refused("sdxl", UNET, "encoder_hid_dim_type", "ip_image_proj"),
    refused("sdxl", UNET, "attention_type", "gated"),
    refused("sdxl", UNET, "block_out_channels", "64", "which is of the wrong type"),
    refused("sdxl", UNET, "layers_per_block", None, "which is of the wrong type"),
    refused("sdxl", UNET, "a_new_field", 1, "a field of which nothing is known here"),
    Odd("a field of another version, off", "sdxl", edit(UNET, a_new_field=False), RIGHT),
    Odd("no sample_size", "sdxl", edit(UNET, sample_size=None), "sample_size: null): give --resolution"),
    Odd("odd sample_size", "sdxl", edit(UNET, sample_size=9), "its own resolution 36x36"),
    Odd("sample_size of two sides", "sdxl", edit(UNET, sample_size=[8, 10]), RIGHT),
    Odd("fewer layers than weights", "sd3", edit(TRANSFORMER, num_layers=1), "the weights in"),
    Odd("fewer layers than weights, CogVideoX", "cogvideox", edit(TRANSFORMER, num_layers=1), "is left over"),
    Odd("more layers than weights", "sd3", edit(TRANSFORMER, num_layers=3), "the weights in"),
    Odd(
        "another width than the weights'",
        "sd3",
        edit(TRANSFORMER, caption_projection_dim=64),
        "the weights in",
    ),
    Odd(
        "dual attention without weights",
        "sd3",
        edit(TRANSFORMER, dual_attention_layers=[0]),
        "the weights in",
    ),
    refused("sd3", TRANSFORMER, "out_channels", 8, "not the 4 of in_channels"),
    refused("cogvideox", TRANSFORMER, "patch_size_t", 2, "known here is null"),
    refused("cogvideox", TRANSFORMER, "ofs_embed_dim", 512, "known here is null"),
    refused("cogvideox", TRANSFORMER, "use_learned_positional_embeddings", True),
    Odd(
        "image-to-video's channels",
        "cogvideox",
        edit(TRANSFORMER, in_channels=8),
        "4, not the 8 of in_channels",
    ),
    Odd("Cog: sample_frames", "cogvideox", edit(TRANSFORMER, sample_frames=10), "multiple of 8, plus 1"),
    # pipelines
    Odd("no force_zeros", "sdxl", edit(INDEX, force_zeros_for_empty_prompt=False), RIGHT),
    refused("sdxl", INDEX, "force_zeros_for_empty_prompt", "false"),
    refused("sdxl", INDEX, "requires_aesthetics_score", True, "which a StableDiffusionXLPipeline"),
    refused("sdxl", INDEX, "unet", None, "known is UNet2DConditionModel"),
    refused("sdxl", INDEX, "unet", [None, None], "known is UNet2DConditionModel"),
    refused("sdxl", INDEX, "text_encoder", [None, None], "known is CLIPTextModel"),
    refused(  # the pipeline would take its pooled text, not the second's
        "sdxl",
        INDEX,
        "text_encoder",
        ["transformers", "CLIPTextModelWithProjection"],
        "known is CLIPTextModel",
    ),
    refused("sdxl", INDEX, "unet", ["antigravity", "UNet"], "known is UNet2DConditionModel"),
    refused("sdxl", INDEX, "controlnet", ["diffusers", "ControlNetModel"], "which a StableDiffusionXL"),
    refused("sd3", INDEX, "tokenizer", [None, None], "known is CLIPTokenizer"),
    Odd(
        "SD3 without T5",
        "sd3",
        all_of(
            edit(INDEX, text_encoder_3=[None, None], tokenizer_3=[None, None]),
            delete("text_encoder_3", "tokenizer_3"),
        ),
        RIGHT,
    ),
    Odd(
        "inpainting",
        "sdxl",
        edit(INDEX, _class_name="StableDiffusionXLInpaintPipeline"),
        'is a "StableDiffusionXLInpaintPipeline"; known are',
    ),
    Odd(
        "refiner",
        "sdxl",
        edit(INDEX, _class_name="StableDiffusionXLImg2ImgPipeline"),
        'is a "StableDiffusionXLImg2ImgPipeline"; known are',
    ),
    Odd("custom code", "sdxl", edit(INDEX, _class_name=["pipeline", "Mine"]), "known are"),
    Odd("no class", "sdxl", take_out(INDEX, "_class_name"), "is a null; known are"),
    refused("sd3", INDEX, "tokenizer_3", [None, None], "but text_encoder_3 wants it"),
    Odd("SD3: a tokenizer_3 to spare", "sd3", edit(INDEX, text_encoder_3=[None, None]), RIGHT),
    refused("sdxl", VAE, "scaling_factor", float("inf"), "which is of the wrong type"),
    refused("sd3", SCHEDULER, "shift", float("nan"), "which is of the wrong type"),
    Odd("sample_size of text", "sdxl", edit(UNET, sample_size="8"), "give --resolution"),
    Odd(
        "more words than the text encoder's",
        "cogvideox",
        add_words("tokenizer/tokenizer.json", 50),
        "words, its text_encoder 26",
    ),
    # files
    Odd("index: no JSON", "sdxl", write(INDEX, b"{"), "could not be loaded"),
    Odd("index: a list", "sdxl", write(INDEX, b"[1]"), "could not be loaded"),
    Odd("index: bytes", "sdxl", write(INDEX, bytes(range(256))), "could not be loaded"),
    Odd("scheduler: no JSON", "sdxl", write(SCHEDULER, b"{"), "scheduler cannot be read"),
    Odd("scheduler: a list", "sdxl", write(SCHEDULER, b"[]"), "scheduler cannot be read"),
    Odd("VAE: empty config", "sdxl", write(VAE, b""), "vae cannot be read"),
    Odd("U-Net: no config", "sdxl", delete(UNET), "unet cannot be read"),
    Odd("text encoder: no JSON", "sdxl", write("text_encoder/config.json", b"{"), "text_encoder cannot"),
    Odd("text encoder: a null", "sdxl", write("text_encoder/config.json", b"null"), "text_encoder cannot"),
    Odd(
        "text encoder: layers left over",
        "sdxl",
        edit("text_encoder/config.json", num_hidden_layers=1),
        "is left over",
    ),
    Odd(
        "text encoder: too few positions",
        "sdxl",
        edit("tokenizer/tokenizer_config.json", model_max_length=77),
        "do not fit together: ",
    ),
    Odd("text encoder: truncated", "sdxl", truncate(TEXT_WEIGHTS, 5000), "text_encoder cannot be loaded"),
    Odd("text encoder: empty", "sdxl", truncate(TEXT_WEIGHTS, 0), "text_encoder cannot be loaded"),
    Odd("U-Net: truncated", "sdxl", truncate(UNET_WEIGHTS, 5000), "unet cannot be loaded"),
    Odd("VAE: broken header", "sdxl", write(VAE_WEIGHTS, b"\xff" * 64), "vae cannot be loaded"),
    Odd(
        "VAE: not finite",
        "sdxl",
        change_weights(VAE_WEIGHTS, lambda state: state[min(state)].fill_(torch.nan)),
        "is not finite",
    ),
    Odd(
        "U-Net: a weight missing",
        "sdxl",
        change_weights(UNET_WEIGHTS, lambda state: state.pop("conv_in.bias")),
        "conv_in.bias is missing",
    ),
    Odd(
        "U-Net: code in a pickle",
        "sdxl",
        put_pickle(UNET_WEIGHTS, "unet/diffusion_pytorch_model.bin"),
        "unet cannot be loaded",
    ),
    Odd(
        "text encoder: code in a pickle",
        "sdxl",
        put_pickle(TEXT_WEIGHTS, "text_encoder/pytorch_model.bin"),
        "text_encoder cannot be loaded",
    ),
    Odd("U-Net: torch's file", "sdxl", put_tensors(UNET_WEIGHTS, "unet/diffusion_pytorch_model.bin"), RIGHT),
    Odd(
        "U-Net: only fp16",
        "sdxl",
        rename(UNET_WEIGHTS, "unet/diffusion_pytorch_model.fp16.safetensors"),
        "there are only those of --variant fp16",
    ),
    Odd(
        "text encoder: only fp16",
        "sdxl",
        rename(TEXT_WEIGHTS, "text_encoder/model.fp16.safetensors"),
        "there are only those of --variant fp16",
    ),
    Odd("no tokenizer", "sdxl", delete("tokenizer"), "tokenizer has no vocabulary"),
    Odd("tokenizer: no words", "sdxl", delete("tokenizer/tokenizer.json"), "has no vocabulary"),
    Odd("tokenizer: a folder", "sdxl", put_folder("tokenizer/tokenizer.json"), "tokenizer cannot be loaded"),
    Odd("tokenizer: no JSON", "sdxl", write("tokenizer/tokenizer.json", b"{"), "tokenizer cannot be loaded"),
    Odd(
        "tokenizer: no config",
        "sdxl",
        delete("tokenizer/tokenizer_config.json"),
        "does not say what model_max_length is",
    ),
    Odd(
        "T5's tokenizer: no JSON",
        "cogvideox",
        write("tokenizer/tokenizer.json", b"[]"),
        "tokenizer cannot be loaded",
    ),
    Odd("T5: truncated", "cogvideox", truncate(TEXT_WEIGHTS, 5000), "text_encoder cannot be loaded"),
]
