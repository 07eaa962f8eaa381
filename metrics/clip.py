"""CLIP score, and the networks of open_clip that HPSv2 is one of, too."""

import os

import torch

from metrics.scorer import Scorer, cut_square
from metrics.weights import find_repository
from support.errors import UserError, first_line, require
from support.packages import OPEN_CLIP
from support.parallel import own_device


class OpenClip(Scorer):
    """100 x cosine of the image's and the prompt's embeddings in a model of open_clip."""

    column = None  # the score's name
    prefix = ""  # put before every prompt

    def load(self, model, weights, weights_dir):
        """Loads the network `model` of open_clip, with weights of one of its tags or of a file of tensors."""
        open_clip = require(*OPEN_CLIP)
        self.device = own_device()
        tag = open_clip.get_pretrained_cfg(model, weights)
        if tag.get("hf_hub"):
            file = "open_clip_model.safetensors"
            folder = find_repository(weights_dir, tag["hf_hub"].strip("/"), file)
            weights = os.path.join(folder, file)
        try:
            self.model, _, self.preprocess = open_clip.create_model_and_transforms(
                model,
                pretrained=weights,
                device=self.device,
                image_mean=tag.get("mean"),
                image_std=tag.get("std"),
                force_quick_gelu=tag.get("quick_gelu", False),
            )
            self.tokenize = open_clip.get_tokenizer(model)
        except Exception as error:  # many kinds, for an unknown model or a wrong file
            raise UserError(
                f"CLIP {model} with weights {weights} could not be loaded: {first_line(error)}"
            ) from error
        self.model.eval()

    def prepare(self, image):
        return self.preprocess(image)

    @torch.no_grad()
    def score(self, images, prompts):
        tokens = self.tokenize([self.prefix + prompt for prompt in prompts])
        image = self.model.encode_image(images.flatten(0, 1).to(self.device), normalize=True)
        text = self.model.encode_text(tokens.to(self.device), normalize=True)
        text = text.repeat_interleave(images.shape[1], 0)
        cosine = (image * text).sum(1)
        return {self.column: 100 * cosine.cpu().numpy()}


class Clip(OpenClip):
    """CLIP score with any model of open_clip, weights by tag or from a local checkpoint.

    As DMD2 measures: the image is cut to a square and resized to 256 pixels before CLIP's own preparation,
    the prompt gets a prefix."""

    column = "clip"

    def __init__(self, args, prompts, video):
        self.prefix = args.clip_prefix
        self.load(args.clip_model, args.clip_weights, args.weights_dir)
        self.description = f"open_clip {args.clip_model}, {args.clip_weights}, prefix {args.clip_prefix!r}"

    def prepare(self, image):
        from PIL import Image

        square = cut_square(image).resize((256, 256), Image.Resampling.LANCZOS)
        return self.preprocess(square)
