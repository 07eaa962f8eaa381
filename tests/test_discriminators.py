"""Heads, taps and backbones of the discriminators, up to the sizes of the real SDXL and SAM."""

import time
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
import torch.nn.functional as F
from segment_anything.modeling import ImageEncoderViT
from transformers import Dinov2Config, Dinov2Model

import common
import helpers
from support.errors import UserError
from support.files import fetch
from support.sam import load_sam_encoder
from support.taps import choose_four
from tiny import train

CPU = torch.device("cpu")


def draw_normal(*shape):
    return torch.randn(shape, generator=torch.Generator().manual_seed(0))


def shapes_of(maps):
    return [tuple(m.shape) for m in maps]


# Heads ----------------------------------------------------------------------------------------------------

SQUARES = tuple((n, n) for n in (2, 3, 4, 5, 7, 8, 16, 33, 64, 128))


@pytest.mark.parametrize("size", SQUARES + ((2, 9), (16, 5), (128, 3)))
def test_head_takes_maps_of_all_sizes(size):
    torch.manual_seed(0)
    maps = draw_normal(3, 12, *size).requires_grad_()
    logits = common.Head((12, *size))(maps)
    logits.sum().backward()
    assert logits.shape == (3,)
    assert logits.isfinite().all()
    assert logits.unique().numel() == 3
    for gradient in maps.grad:
        assert gradient.isfinite().all()
        assert gradient.norm() > 1e-6


@pytest.mark.parametrize("side, convolutions", ((2, 0), (4, 0), (8, 1), (16, 2), (32, 3), (128, 3)))
def test_head_shrinks_as_often_as_the_map_allows(side, convolutions):
    layers = common.Head((12, side, side)).body
    strides = [layer.stride for layer in layers if isinstance(layer, torch.nn.Conv2d)]
    assert strides == [(2, 2)] * convolutions + [(1, 1)]


def test_a_head_is_the_papers():
    """[Conv 4x4 stride 2, GroupNorm, SiLU] here once, [Conv 3x3, GroupNorm, SiLU], the mean of all places, a
    linear layer."""
    maps = draw_normal(2, 12, 8, 8)
    head = common.Head(maps.shape[1:], width=64)
    first, first_norm, _, last, last_norm, _ = head.body
    x = F.conv2d(maps, first.weight, first.bias, stride=2, padding=1)
    x = F.silu(F.group_norm(x, 32, first_norm.weight, first_norm.bias))
    x = F.conv2d(x, last.weight, last.bias, padding=1)
    x = F.silu(F.group_norm(x, 32, last_norm.weight, last_norm.bias))
    expected = (x.mean((2, 3)) * head.logit.weight).sum(1)
    torch.testing.assert_close(head(maps), expected)


def test_a_head_of_videos_shrinks_frame_by_frame():
    """As often as a frame allows, of however few frames; then one convolution over the frames."""
    maps = draw_normal(2, 12, 3, 16, 16)
    head = common.Head(maps.shape[1:], width=64)
    convolutions = [layer for layer in head.body if isinstance(layer, torch.nn.Conv3d)]
    shapes = [(layer.kernel_size, layer.stride) for layer in convolutions]
    assert shapes == [((1, 4, 4), (1, 2, 2))] * 2 + [((3, 3, 3), (1, 1, 1))]
    first = convolutions[0]
    expected = F.conv2d(maps[:, :, 1], first.weight[:, :, 0], first.bias, stride=2, padding=1)
    torch.testing.assert_close(first(maps)[:, :, 1], expected)


def test_heads_give_a_logit_a_map():
    maps = [draw_normal(2, 8, 16, 16), draw_normal(2, 20, 4, 4)]
    heads = common.Heads(maps, width=64)
    logits = heads(maps)
    assert logits.shape == (2, 2)
    torch.testing.assert_close(logits[:, 1], heads.heads[1](maps[1]))


def test_heads_take_several_lists_of_maps_in_one_pass():
    maps = [draw_normal(2, 8, 16, 16), draw_normal(2, 20, 4, 4)]
    others = [-m for m in maps]
    heads = common.Heads(maps, width=64)
    first, second = heads(maps, others)
    torch.testing.assert_close(first, heads(maps))
    torch.testing.assert_close(second, heads(others))


# Taps on the teacher --------------------------------------------------------------------------------------


def count_hooks(net):
    return sum(len(module._forward_hooks) for module in net.modules())


def test_features_of_the_tiny_teacher(teacher):
    maps = teacher.features(draw_normal(2, 4, 8, 8), torch.tensor([1.0, 500.0]), teacher.null(2))
    assert shapes_of(maps) == [(2, 64, 8, 8), (2, 64, 4, 4), (2, 64, 4, 4)]
    assert all(m.isfinite().all() for m in maps)
    assert count_hooks(teacher.denoiser) == 0


def test_features_end_at_the_deepest_tap(teacher):
    ran = []
    handles = []
    for name, module in teacher.denoiser.named_modules():
        part, *rest = name.split(".")
        if part in ("down_blocks", "mid_block", "up_blocks", "conv_out") and len(rest) <= 1:
            hook = lambda module, inputs, name=name: ran.append(name)
            handles.append(module.register_forward_pre_hook(hook))
    teacher.features(draw_normal(1, 4, 8, 8), torch.tensor([500.0]), teacher.null(1))
    for handle in handles:
        handle.remove()
    assert {"down_blocks.0", "down_blocks.1", "mid_block"} <= set(ran)
    assert not [name for name in ran if name.startswith(("up_blocks", "conv_out"))]


def test_a_tap_is_the_last_residual_before_the_downsampler(tmp_path):
    """Of two in each block."""
    torch.manual_seed(0)
    pipe = train.FAMILIES["sdxl"]["build"]()
    config = dict(pipe.unet.config) | {"layers_per_block": 2}
    pipe.unet = type(pipe.unet).from_config(config)
    pipe.save_pretrained(tmp_path / "teacher")
    teacher = helpers.load_teacher(str(tmp_path / "teacher"), torch.device("cpu"))
    outputs = []
    block = teacher.denoiser.down_blocks[0]
    last = block.attentions[-1] if getattr(block, "attentions", None) else block.resnets[-1]
    last.register_forward_hook(lambda module, inputs, out: outputs.append(out))
    x = torch.randn(1, *teacher.latent_shape)
    maps = teacher.features(x, torch.tensor([500.0]), teacher.null(1))
    [output] = outputs
    assert maps[0].equal(output if torch.is_tensor(output) else output[0])


def test_maps_wait_as_they_are_and_heads_read_them_in_float32(teacher_folder):
    """ADM keeps them from one update to the next: in float32 they would take twice the memory."""
    teacher = helpers.load_teacher(teacher_folder, CPU, torch.bfloat16)
    x = draw_normal(2, 4, 8, 8)
    maps = teacher.features(x, torch.tensor([1.0, 500.0]), teacher.null(2))
    assert {m.dtype for m in maps} == {torch.bfloat16}
    heads = teacher.make_heads(64)
    logits = heads(maps)
    assert logits.dtype == torch.float32
    assert logits.equal(heads([m.float() for m in maps]))


def test_hooks_are_removed_after_an_error(teacher):
    with pytest.raises(RuntimeError):
        teacher.features(draw_normal(1, 5, 8, 8), torch.tensor([500.0]), teacher.null(1))
    assert count_hooks(teacher.denoiser) == 0


def test_features_depend_on_the_condition_and_the_time(teacher):
    x = draw_normal(1, 4, 8, 8)
    maps = []
    for t in (10.0, 900.0):
        for cond in (teacher.null(1), teacher.encode(["a red circle"])):
            maps.append(teacher.features(x, torch.tensor([t]), cond)[-1])
    for i, one in enumerate(maps):
        for other in maps[:i]:
            assert (one - other).abs().max() > 1e-3


def test_checkpointing_changes_no_feature_and_no_gradient(teacher_folder):
    teacher = helpers.load_teacher(teacher_folder, CPU)
    results = []
    for checkpointing in (False, True):
        if checkpointing:
            teacher.denoiser.train().enable_gradient_checkpointing()
        x = draw_normal(2, 4, 8, 8).requires_grad_()
        maps = teacher.features(x, torch.tensor([10.0, 900.0]), teacher.null(2))
        sum(m.square().mean() for m in maps).backward()
        results.append([*(m.detach() for m in maps), x.grad])
        assert x.grad.norm() > 1e-3
        assert all(p.grad is None for p in teacher.denoiser.parameters())
    torch.testing.assert_close(*results)


# SAM ------------------------------------------------------------------------------------------------------

SIZES = {
    "img_size": 80,
    "patch_size": 8,
    "embed_dim": 40,
    "depth": 5,
    "num_heads": 5,
    "out_chans": 24,
    "window_size": 4,
    "global_attn_indexes": (0, 3, 4),
}
OFFICIAL = (  # width, blocks, heads of attention, blocks with global attention
    (768, 12, 12, [2, 5, 8, 11]),
    (1024, 24, 16, [5, 11, 17, 23]),
    (1280, 32, 16, [7, 15, 23, 31]),
)


@pytest.mark.parametrize("suffix", ("pth", "safetensors"))
def test_sam_sizes_are_read_off_the_file(tmp_path, suffix):
    encoder = helpers.make_sam(seed=1, **SIZES)
    loaded = load_sam_encoder(helpers.save_sam(encoder, tmp_path / f"sam.{suffix}"))
    assert loaded.img_size == 80
    assert loaded.patch_embed.proj.stride == (8, 8)
    assert [block.window_size for block in loaded.blocks] == [0, 4, 4, 0, 0]
    assert {block.attn.num_heads for block in loaded.blocks} == {5}
    x = draw_normal(2, 3, 80, 80)
    assert loaded.eval()(x).equal(encoder(x))


@pytest.mark.parametrize(
    "depth, places",
    (
        (57, [13, 27, 41, 56]),
        (30, [6, 14, 21, 29]),
        (4, [0, 1, 2, 3]),
        (2, [0, 1]),
    ),
)
def test_maps_are_of_layers_at_even_distances(depth, places):
    assert choose_four(range(depth)) == places


@pytest.mark.filterwarnings("ignore:for .* copying from a non-meta parameter")
@pytest.mark.parametrize("dim, depth, heads, taps", OFFICIAL, ids=("vit_b", "vit_l", "vit_h"))
def test_sizes_of_the_official_sams(tmp_path, dim, depth, heads, taps):
    """Files with the official shapes and one number a tensor, read onto the meta device."""
    options = {"use_rel_pos": True, "window_size": 14, "global_attn_indexes": taps}
    with torch.device("meta"):
        encoder = ImageEncoderViT(1024, 16, 3, dim, depth, heads, **options)
    shapes = {name: weight.shape for name, weight in encoder.state_dict().items()}
    state = {f"image_encoder.{name}": torch.zeros(1).expand(shape) for name, shape in shapes.items()}
    torch.save(state, tmp_path / "sam.pth")
    with torch.device("meta"):
        loaded = load_sam_encoder(str(tmp_path / "sam.pth"))
    assert [i for i, block in enumerate(loaded.blocks) if block.window_size == 0] == taps
    assert {block.window_size for block in loaded.blocks} == {0, 14}
    assert {block.attn.num_heads for block in loaded.blocks} == {heads}
    assert {name: weight.shape for name, weight in loaded.state_dict().items()} == shapes


@pytest.fixture
def sam(sam_file):
    return common.PixelBackbone(sam_file, CPU, torch.float32)


def test_sam_features_are_its_own_global_blocks(sam):
    """At the native size; pixels are prepared as SAM prepares them, from 0 to 255 with its own mean and
    deviation."""
    pixels = draw_normal(2, 3, 64, 64).clamp(-1, 1)
    encoder = helpers.make_sam(seed=0)
    mean = torch.tensor([123.675, 116.28, 103.53]).view(1, 3, 1, 1)
    std = torch.tensor([58.395, 57.12, 57.375]).view(1, 3, 1, 1)
    x = encoder.patch_embed(((pixels + 1) * 127.5 - mean) / std) + encoder.pos_embed
    expected = []
    for i, block in enumerate(encoder.blocks):
        x = block(x)
        if i in (1, 3):
            expected.append(x.permute(0, 3, 1, 2))
    torch.testing.assert_close(sam.features(pixels), expected, rtol=1e-4, atol=1e-4)


def test_sam_at_other_sizes(sam):
    native = sam.features(draw_normal(1, 3, 64, 64))
    for rows, columns in ((32, 32), (64, 96), (128, 128), (16, 40)):
        pixels = draw_normal(2, 3, rows, columns).requires_grad_()
        maps = sam.features(pixels)
        assert shapes_of(maps) == [(2, 24, rows // 8, columns // 8)] * 2
        sum(m.square().mean() for m in maps).backward()
        assert pixels.grad.isfinite().all()
        assert (pixels.grad.abs().sum((1, 2, 3)) > 0).all()
    assert all(p.grad is None and not p.requires_grad for p in sam.encoder.parameters())
    torch.testing.assert_close(sam.features(draw_normal(1, 3, 64, 64)), native)


def test_sam_resizes_what_is_no_multiple_of_its_patch(sam):
    assert [tuple(m.shape[2:]) for m in sam.features(draw_normal(1, 3, 70, 5))] == [(8, 2)] * 2


# DINOv2 ---------------------------------------------------------------------------------------------------


def test_dinov2(tmp_path):
    torch.manual_seed(0)
    sizes = {"hidden_size": 24, "num_hidden_layers": 8, "num_attention_heads": 3}
    encoder = Dinov2Model(Dinov2Config(**sizes, image_size=56, patch_size=14)).eval()
    encoder.save_pretrained(tmp_path)
    backbone = common.PixelBackbone(str(tmp_path), CPU, torch.float32)
    for side, expected in ((56, 4), (32, 2), (112, 8)):
        pixels = draw_normal(2, 3, side, side).requires_grad_()
        maps = backbone.features(pixels)
        assert shapes_of(maps) == [(2, 24, expected, expected)] * 4
        maps[0].square().mean().backward()
        assert pixels.grad.norm() > 0
    pixels = draw_normal(1, 3, 56, 56)
    mean = torch.tensor((0.485, 0.456, 0.406)).view(1, 3, 1, 1)
    std = torch.tensor((0.229, 0.224, 0.225)).view(1, 3, 1, 1)
    states = encoder(((pixels + 1) / 2 - mean) / std, output_hidden_states=True).hidden_states
    place = 1 + 4 + 2  # the class token comes first, then a row of 4, then two of the next
    for m, i in zip(backbone.features(pixels), (2, 4, 6, 8)):
        torch.testing.assert_close(m[0, :, 1, 2], states[i][0, place], rtol=1e-4, atol=1e-4)


# Files that are no backbone -------------------------------------------------------------------------------


def write_text(path):
    path.write_text("not a checkpoint\n")


def write_without_prefix(path):
    torch.save(helpers.make_sam(seed=0).state_dict(), path)


def write_without_a_layer(path):
    state = helpers.make_sam(seed=0).state_dict()
    torch.save({f"image_encoder.{k}": w for k, w in state.items() if "neck.2" not in k}, path)


OTHER_FILES = (
    ("text.pth", write_text),
    ("text.safetensors", write_text),
    ("empty.pth", lambda path: path.write_bytes(b"")),
    ("other.pth", lambda path: torch.save({"weight": torch.zeros(3)}, path)),
    ("list.pth", lambda path: torch.save([torch.zeros(3)], path)),
    ("prefix.pth", write_without_prefix),
    ("half.pth", write_without_a_layer),
)


@pytest.mark.parametrize("name, write", OTHER_FILES)
def test_other_files_are_refused(tmp_path, name, write):
    write(tmp_path / name)
    with pytest.raises(UserError, match="is not a SAM checkpoint"):
        common.PixelBackbone(str(tmp_path / name), CPU, torch.float32)


def test_missing_backbones_are_refused(tmp_path):
    for suffix in ("pth", "safetensors"):
        with pytest.raises(UserError, match="there is no SAM checkpoint"):
            common.PixelBackbone(str(tmp_path / f"nowhere.{suffix}"), CPU, torch.float32)
    with pytest.raises(UserError, match="could not be loaded"):
        common.PixelBackbone(str(tmp_path), CPU, torch.float32)  # a folder without a model


def test_a_published_file_is_fetched_once(tmp_path, monkeypatch):
    """By whoever comes first; the others wait for it."""
    fetched = []

    def download(url, path, progress):
        fetched.append(url)
        time.sleep(0.2)
        with open(path, "w") as file:
            file.write("weights")

    monkeypatch.setattr(torch.hub, "get_dir", lambda: str(tmp_path))
    monkeypatch.setattr(torch.hub, "download_url_to_file", download)
    url = "https://example.org/sam.pth"
    with ThreadPoolExecutor(4) as pool:
        futures = [pool.submit(fetch, url, "give --pixel-backbone PATH") for _ in range(4)]
    path = tmp_path / "checkpoints/sam.pth"
    assert [future.result() for future in futures] == [str(path)] * 4
    assert fetched == [url]
    assert path.read_text() == "weights"
