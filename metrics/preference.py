"""PickScore, HPSv2 and MPS: CLIPs that were trained on people's preferences."""

import os

import torch
import torch.nn.functional as F

from metrics.clip import OpenClip
from metrics.scorer import Scorer
from metrics.weights import find_repository, load_weights, read_weights
from support.errors import UserError, first_line
from support.parallel import own_device


class Hpsv2(OpenClip):
    """Human Preference Score v2: 100 x cosine in a CLIP ViT-H-14.

    v2.0 is the paper's order of magnitude; numbers of v2.1 are of another scale, in a column of their own. As
    its authors prepare them, images that are not square get black bars: nothing is cut off."""

    MODEL = "ViT-H-14"
    FILES = {"2.0": "HPS_v2_compressed.pt", "2.1": "HPS_v2.1_compressed.pt"}
    COLUMNS = {"2.0": "hpsv2", "2.1": "hpsv2.1"}

    def __init__(self, args, prompts, video):
        file = self.FILES[args.hps_version]
        folder = find_repository(args.weights_dir, "xswu/HPSv2", file)
        self.column = self.COLUMNS[args.hps_version]
        self.description = f"version {args.hps_version}: open_clip {self.MODEL}, xswu/HPSv2 {file}"
        self.load(self.MODEL, os.path.join(folder, file), args.weights_dir)

    def prepare(self, image):
        side = self.model.visual.image_size
        return self.preprocess(fit_into_square(image, side[0] if isinstance(side, tuple) else side))


def fit_into_square(image, side):
    """A Pillow image -> the same in a black square of `side` pixels, as large as it fits."""
    from PIL import Image

    scale = side / max(image.size)
    width, height = (round(length * scale) for length in image.size)
    square = Image.new("RGB", (side, side))
    resized = image.resize((width, height), Image.Resampling.BICUBIC)
    square.paste(resized, ((side - width) // 2, (side - height) // 2))
    return square


class HubClip(Scorer):
    """What PickScore and MPS share: image processor and tokenizer of the CLIP that both began from."""

    BASE = "laion/CLIP-ViT-H-14-laion2B-s32B-b79K"
    BASE_FILES = ("config.json", "preprocessor_config.json", "tokenizer.json", "tokenizer_config.json")

    def __init__(self, weights_dir):
        from transformers import AutoTokenizer, CLIPImageProcessorPil

        self.device = own_device()
        self.base = find_repository(weights_dir, self.BASE, *self.BASE_FILES)
        # Pillow's resizing, as when the scores were published
        self.process = CLIPImageProcessorPil.from_pretrained(self.base)
        self.tokenizer = AutoTokenizer.from_pretrained(self.base)

    def prepare(self, image):
        return self.process(images=image, return_tensors="pt").pixel_values[0]

    def tokenize(self, texts):
        """Texts -> token ids [n, the model's length]."""
        tokens = self.tokenizer(
            texts,
            padding="max_length",
            truncation=True,
            max_length=self.model.config.text_config.max_position_embeddings,
            return_tensors="pt",
        )
        return tokens.input_ids.to(self.device)

    def compare(self, image, text):
        """Embeddings [n, D] each -> exp(logit_scale) x their cosines, array [n]."""
        cosine = (F.normalize(image, dim=1) * F.normalize(text, dim=1)).sum(1)
        return (self.model.logit_scale.exp() * cosine).cpu().numpy()


class PickScore(HubClip):
    """PickScore: exp(logit_scale) x cosine."""

    REPOSITORY = "yuvalkirstain/PickScore_v1"
    description = REPOSITORY

    def __init__(self, args, prompts, video):
        from transformers import CLIPModel

        super().__init__(args.weights_dir)
        folder = find_repository(args.weights_dir, self.REPOSITORY, "config.json", "model.safetensors")
        try:
            self.model = CLIPModel.from_pretrained(folder, dtype=torch.float32).to(self.device).eval()
        except (OSError, ValueError, RuntimeError) as error:
            raise UserError(
                f"PickScore's model in {folder} could not be loaded: {first_line(error)}"
            ) from error

    @torch.no_grad()
    def score(self, images, prompts):
        pixels = images.flatten(0, 1).to(self.device)
        image = self.model.get_image_features(pixel_values=pixels).pooler_output
        text = self.model.get_text_features(input_ids=self.tokenize(prompts)).pooler_output
        return {"pick": self.compare(image, text.repeat_interleave(images.shape[1], 0))}


class Mps(HubClip):
    """Multi-dimensional Preference Score, of Kwai-Kolors/MPS, "overall": a CLIP whose image tokens look at
    those words of the prompt that matter to a condition, through a small cross-attention model.
    exp(logit_scale) x cosine of the first image token and the prompt.

    The published checkpoint is a pickled module, which is never opened here; MPS_overall.safetensors has its
    tensors (see docs/metrics.md)."""

    CONDITION = (
        "light, color, clarity, tone, style, ambiance, artistry, shape, face, hair, hands, limbs, "
        "structure, instance, texture, quantity, attributes, position, number, location, word, things."
    )
    FILE = "MPS_overall.safetensors"
    THRESHOLD = 0.3  # of its evaluation script; its training forward has 0.01
    description = "overall, threshold 0.3"

    def __init__(self, args, prompts, video):
        from transformers import CLIPConfig, CLIPModel

        path = os.path.join(args.weights_dir or "", self.FILE)
        if not os.path.exists(path):
            place = f"at {path}" if args.weights_dir else "there without --weights-dir"
            raise UserError(
                f"the file {self.FILE} is wanted, and it is not {place}: make it from "
                "MPS_overall_checkpoint.pth as docs/metrics.md says, and give --weights-dir with its folder"
            )
        super().__init__(args.weights_dir)
        state = read_weights(path)
        clip_state = {name.removeprefix("model."): weight for name, weight in state.items()}
        model = CLIPModel(CLIPConfig.from_pretrained(self.base))
        self.model = load_weights(model, clip_state, path).to(self.device)

        cross_state = select(state, "cross_model.layers.")
        if "0.0.fn.to_q.weight" not in cross_state:
            raise UserError(
                f"{path} has no cross-attention model (cross_model.layers.0.0.fn.to_q.weight); make it as "
                "docs/metrics.md says"
            )
        cross_state = {name: weight.float().to(self.device) for name, weight in cross_state.items()}
        count = 1 + max(int(name.split(".")[0]) for name in cross_state)
        self.layers = []  # of each layer the weights of its cross-attention, and of its self-attention
        for i in range(count):
            self.layers.append((select(cross_state, f"{i}.0.fn."), select(cross_state, f"{i}.1.fn.")))

    def list_weights(self):
        weights = super().list_weights()
        for cross, own in self.layers:
            weights += [*cross.values(), *own.values()]
        return weights

    @torch.no_grad()
    def score(self, images, prompts):
        tokens = self.model.vision_model(images.flatten(0, 1).to(self.device)).last_hidden_state
        image = self.model.visual_projection(tokens)  # [P K, 257, D]
        words, end = self.encode_text(prompts)  # [P, 77, D], [P, D]
        condition, _ = self.encode_text([self.CONDITION])
        similarity = torch.einsum("pid,jd->pij", words, condition[0]).amax(2)  # [P, 77]
        kept = similarity / similarity.amax(1, keepdim=True) > self.THRESHOLD

        samples = images.shape[1]
        words = words.repeat_interleave(samples, 0)
        kept = kept.repeat_interleave(samples, 0)
        end = end.repeat_interleave(samples, 0)
        fused = self.fuse(image, words, kept)
        return {"mps": self.compare(fused[:, 0], end)}

    def encode_text(self, texts):
        """Projected features of all tokens [P, 77, D], and of the end-of-text token [P, D]."""
        out = self.model.text_model(self.tokenize(texts))
        projection = self.model.text_projection
        return projection(out.last_hidden_state), projection(out.pooler_output)

    def fuse(self, x, words, kept):
        """The cross-attention model: image tokens x [B, N, D], prompt tokens [B, M, D] of which `kept` [B, M]
        are seen -> [B, N, D]."""
        for cross, own in self.layers:
            x = attend_to_words(x, words, kept, cross)
            x = attend_to_itself(x, own)
        return x


def select(state, prefix):
    """The entries whose names begin with `prefix`, without it."""
    return {name.removeprefix(prefix): w for name, w in state.items() if name.startswith(prefix)}


def attend_to_words(x, words, kept, weights):
    """Cross-attention of x [B, N, D] to the `kept` [B, M] of words [B, M, D], a feed-forward beside it."""
    h = F.layer_norm(x, x.shape[-1:], weights["norm.weight"])
    query = F.linear(h, weights["to_q.weight"])
    key, value = F.linear(words, weights["to_kv.weight"]).chunk(2, dim=-1)
    seen = attend(query, key, value, kept[:, None, None])
    hidden = apply_swiglu(F.linear(h, weights["ff.0.weight"]))
    return x + F.linear(seen, weights["to_out.weight"]) + F.linear(hidden, weights["ff.2.weight"])


def attend_to_itself(x, weights):
    """Self-attention of x [B, N, D] with rotation, a feed-forward beside it, one projection for both."""
    out, ff_out = weights["attn_out.weight"], weights["ff_out.1.weight"]
    widths = (out.shape[1], 64, 64, 2 * ff_out.shape[1])  # heads x 64, a key head, a value head, feed-forward
    h = F.layer_norm(x, x.shape[-1:], weights["norm.weight"])
    projected = F.linear(h, weights["fused_attn_ff_proj.weight"])
    query, key, value, hidden = projected.split(widths, dim=-1)
    seen = attend(rotate(query), rotate(key), value)
    return x + F.linear(seen, out) + F.linear(apply_swiglu(hidden), ff_out)


def attend(query, key, value, mask=None):
    """Heads of 64 with one key and one value head: query [B, N, heads x 64], key and value [B, M, 64]
    -> [B, N, heads x 64]."""
    query = query.unflatten(2, (-1, 64)).transpose(1, 2)
    heads = query.shape[1]
    key = key[:, None].expand(-1, heads, -1, -1)
    value = value[:, None].expand(-1, heads, -1, -1)
    seen = F.scaled_dot_product_attention(query, key, value, mask)
    return seen.transpose(1, 2).flatten(2)


def rotate(x):
    """Rotary positions, base 10000, of x [B, N, n x 64]: of every 64 channels i turns with channel i + 32."""
    position = torch.arange(x.shape[1], device=x.device)[:, None]
    exponent = torch.arange(0, 64, 2, device=x.device) / 64
    angle = position / 10000**exponent
    cos, sin = angle.cos()[:, None], angle.sin()[:, None]
    first, second = x.unflatten(2, (-1, 64)).chunk(2, dim=-1)
    turned = torch.cat([first * cos - second * sin, second * cos + first * sin], dim=-1)
    return turned.flatten(2)


def apply_swiglu(x):
    value, gate = x.chunk(2, dim=-1)
    return value * F.silu(gate)
