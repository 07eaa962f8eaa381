"""LoRA files of students and teachers: what is in them, and what cannot be is refused at once."""

import os
import shutil

import pytest
import torch
from diffusers import DiffusionPipeline, StableDiffusionXLPipeline
from safetensors.torch import load_file, save_file
from torch import nn

import adm
import common
import helpers
import sample
from support.checkpoints import LORA_FILE
from support.errors import UserError
from support.export import describe_split, write_lora_lines
from support.files import read_json
from support.lora import Adapted, find_targets
from support.lora_files import factorise, save_layers, split_change
from support.teacher_lora import list_lora_parts

RANK = 3

# The low-rank part of a whole student ----------------------------------------------------------------------


@pytest.mark.parametrize("shape", ((80, 120), (120, 80), (3, 120)))
def test_factors_are_as_near_as_any_of_their_rank(shape):
    torch.manual_seed(0)
    matrix = torch.randn(shape) * torch.linspace(1, 0.1, shape[1])
    down, up = factorise(matrix, 5)
    assert down.shape == (5, shape[1])
    assert up.shape == (shape[0], 5)
    best = torch.linalg.svdvals(matrix)[5:].norm()
    assert (matrix - up @ down).norm() <= 1.01 * best + 1e-5


def test_what_a_lora_leaves_out_is_named_and_measured():
    """The error is of all weights together; layers of every kind come back, and what has no such form does
    not."""
    torch.manual_seed(0)

    def make():
        grouped = nn.Conv2d(4, 8, 3, groups=2)
        net = nn.Sequential(nn.Linear(6, 5), nn.Conv2d(3, 8, 3, padding=1), nn.GroupNorm(2, 8), grouped)
        net.table = nn.Parameter(torch.randn(3))  # as Wan's scale_shift_table, of no layer
        return net

    teacher, student = make(), make()
    for name in ("3.bias", "2.weight"):
        dict(student.named_parameters())[name].data = dict(teacher.named_parameters())[name].data.clone()
    layers, left_out, error = split_change(student, teacher, 2, helpers.CPU)
    assert left_out == ["table", "0.bias", "1.bias", "3.weight"]
    assert set(layers) == {f"{k}.lora_{part}.weight" for k in (0, 1) for part in "AB"}
    assert layers["1.lora_A.weight"].shape == (2, 3, 3, 3)
    assert layers["1.lora_B.weight"].shape == (8, 2, 1, 1)
    after = {name: weight.detach().clone() for name, weight in teacher.named_parameters()}
    for k in (0, 1):
        down, up = layers[f"{k}.lora_A.weight"], layers[f"{k}.lora_B.weight"]
        after[f"{k}.weight"] += (up.flatten(1) @ down.flatten(1)).view(after[f"{k}.weight"].shape)
    missing = sum((weight - after[name]).square().sum() for name, weight in student.named_parameters())
    before = dict(teacher.named_parameters())
    whole = sum((weight - before[name]).square().sum() for name, weight in student.named_parameters())
    assert error == pytest.approx((missing / whole).sqrt().item(), rel=1e-4)
    text = describe_split(2, left_out, error)
    assert f"relative error {error:.3g}" in text
    assert "4 norms, biases and the like are left out (0.bias, 1.bias, 3.weight, table)" in text


# Other readers ---------------------------------------------------------------------------------------------


def test_kohyas_form_of_an_sdxl_file_is_the_same_lora(tmp_path):
    """docs/students.md converts it so for ComfyUI, which knows the layers of a U-Net by these names."""
    from diffusers.utils import convert_state_dict_to_kohya

    teacher = helpers.load_teacher(helpers.make_teacher(tmp_path / "teacher", 0), helpers.CPU)
    targets = list(find_targets(teacher.denoiser))
    state, layers = helpers.adapt(teacher, RANK)
    save_layers(teacher, layers, str(tmp_path))
    converted = convert_state_dict_to_kohya(load_file(tmp_path / LORA_FILE))
    assert {key.split(".")[0] for key in converted} == {f"lora_unet_{n.replace('.', '_')}" for n in targets}
    assert all(value == RANK for key, value in converted.items() if key.endswith(".alpha"))
    pipe = helpers.load_teacher(str(tmp_path / "teacher"), helpers.CPU).pipe
    pipe.load_lora_weights(converted)
    pipe.fuse_lora(components=["unet"])
    pipe.unload_lora_weights()
    for name, weight in pipe.unet.state_dict().items():
        torch.testing.assert_close(weight, state[name], rtol=1e-4, atol=1e-5)


def test_a_checkpoint_of_an_adapter_is_its_whole_student(students):
    """And holds no weight of the teacher's."""
    adapter, whole = students
    assert not os.path.exists(os.path.join(adapter, "student"))
    teacher = helpers.load_teacher(read_json(os.path.join(adapter, "meta.json"))["teacher"], helpers.CPU)
    weights = [helpers.load_student(path, teacher)[0].state_dict() for path in (adapter, whole)]
    assert weights[0].keys() == weights[1].keys()
    for name, weight in weights[0].items():
        torch.testing.assert_close(weight, weights[1][name], rtol=1e-5, atol=1e-6)


def test_an_adapter_is_kept_where_the_pipeline_reads_none(tmp_path, monkeypatch):
    monkeypatch.setattr(StableDiffusionXLPipeline, "_lora_loadable_modules", [])
    teacher = helpers.load_teacher(helpers.make_teacher(tmp_path / "teacher", 0), helpers.CPU)
    state, layers = helpers.adapt(teacher, RANK)
    checkpoint = helpers.save_checkpoint(tmp_path / "adapter", teacher, layers=layers)
    student, *_ = helpers.load_student(checkpoint, teacher)
    for name, weight in student.state_dict().items():
        torch.testing.assert_close(weight, state[name], rtol=1e-5, atol=1e-6)


def test_a_run_goes_on_from_the_adapter_that_is_drawn_with(students, prompts_file, tmp_path):
    """Layer by layer; and from none of other layers, be they of the same shapes, or of another rank."""
    adapter, _ = students
    teacher = read_json(os.path.join(adapter, "meta.json"))["teacher"]
    words = f"--teacher {teacher} --prompts {prompts_file} --loss dmd --iterations 1 --lr 0".split()
    words = [*helpers.QUICK, *words]

    def run(name, options):
        adm.main([*words, "--out", str(tmp_path / name), *options.split()])
        return load_file(tmp_path / name / "step_000001" / LORA_FILE)

    before = load_file(os.path.join(adapter, LORA_FILE))
    torch.testing.assert_close(run("all", f"--init {adapter} --lora {RANK}"), before, rtol=0, atol=0)
    run("part", f"--lora {RANK} --lora-targets attn1.to_q")
    for start, options in (
        (adapter, "--lora 2"),
        (adapter, f"--lora {RANK} --lora-targets attn1.to_q"),
        (tmp_path / "part", f"--lora {RANK} --lora-targets attn1.to_k"),
    ):
        with pytest.raises(UserError, match="of the same --lora and --lora-targets"):
            run("other", f"--init {start} {options}")


# Refused ---------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def students(tmp_path_factory):
    """(folder of a student that is an adapter, that of one whose every weight trained)."""
    root = tmp_path_factory.mktemp("students")
    teacher = helpers.load_teacher(helpers.make_teacher(root / "teacher", 0), helpers.CPU)
    state, layers = helpers.adapt(teacher, RANK)
    adapter = helpers.save_checkpoint(root / "adapter", teacher, layers=layers)
    whole = helpers.save_checkpoint(root / "whole", teacher, state=state)
    return adapter, whole


MISTAKES = (
    ("--student {0} --export-lora x.safetensors --rank 4", "this one's adapter has its own"),
    ("--student {1} --export-lora x.safetensors", "give the LoRA's --rank"),
    ("--student {0} --export-lora x.bin", "ends in .safetensors"),
    ("--student {0} --export-lora there/x.safetensors", "there/scheduler is there already"),
    ("--student {0} --export-lora x.safetensors --export y", "either --export or --export-lora"),
    ("--student {0} --export-lora x.safetensors --prompt x", "take a --student and no prompts"),
    ("--student {0} --prompt x --rank 4", "--rank is for --export-lora"),
    ("--export-lora x.safetensors", "take a --student and no prompts"),
)


@pytest.mark.parametrize("words, sentence", MISTAKES)
def test_mistakes_are_refused_before_anything_is_written(students, tmp_path, monkeypatch, words, sentence):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "there" / "scheduler").mkdir(parents=True)
    monkeypatch.setattr(common.Teacher, "network", None)
    with pytest.raises(UserError, match=sentence):
        sample.main(words.format(*students).split())
    assert sorted(path.name for path in tmp_path.rglob("*")) == ["scheduler", "there"]


def test_a_damaged_adapter_is_no_export(students, tmp_path):
    checkpoint = str(tmp_path / "copy")
    shutil.copytree(students[0], checkpoint)
    with open(os.path.join(checkpoint, LORA_FILE), "r+b") as file:
        file.seek(-1, os.SEEK_END)
        file.write(b"\x7f")
    with pytest.raises(UserError, match="is damaged"):
        sample.main(["--student", checkpoint, "--export-lora", str(tmp_path / "x.safetensors")])


def test_a_pipeline_that_reads_no_lora_gets_none(students, tmp_path, monkeypatch):
    monkeypatch.setattr(StableDiffusionXLPipeline, "_lora_loadable_modules", [])
    with pytest.raises(UserError, match="StableDiffusionXLPipeline reads no LoRA files"):
        sample.main(["--student", students[0], "--export-lora", str(tmp_path / "x.safetensors")])


def test_a_student_of_another_teacher_gets_no_file(students, tmp_path):
    other = helpers.make_teacher(tmp_path / "other", 1)
    words = ["--student", students[1], "--export-lora", str(tmp_path / "x.safetensors"), "--rank", "2"]
    with pytest.raises(UserError, match="was distilled from"):
        sample.main([*words, "--teacher", other])


def test_targets_are_the_layers_whose_names_end_so(teacher):
    every = find_targets(teacher.denoiser)
    chosen = find_targets(teacher.denoiser, ["attn1.to_q", "to_v"])
    assert set(chosen) == {name for name in every if name.endswith(("attn1.to_q", ".to_v"))}
    assert 0 < len(chosen) < len(every)
    with pytest.raises(UserError, match="--lora-targets o_q is the end of none of .*attn1.to_q"):
        find_targets(teacher.denoiser, ["to_v", "o_q"])


# Another teacher: a fine-tune, a LoRA in the weights ------------------------------------------------------


@pytest.fixture(scope="module")
def tuned(tmp_path_factory):
    """(folder of an SDXL teacher, a LoRA file of its U-Net and first text encoder, their merged weights)."""
    root = tmp_path_factory.mktemp("tuned")
    folder = helpers.make_teacher(root / "teacher", 0)
    pipe = helpers.load_teacher(folder, helpers.CPU).pipe
    torch.manual_seed(2)
    layers, merged = {}, {}
    for part in ("unet", "text_encoder"):
        net = getattr(pipe, part)
        merged[part] = {name: weight.clone() for name, weight in net.state_dict().items()}
        layers[part] = {}
        ending = "to_q" if part == "unet" else "q_proj"
        for name in [name for name, _ in net.named_modules() if name.endswith(ending)]:
            weight = merged[part][f"{name}.weight"]
            down, up = torch.randn(2, weight.shape[1]), 0.1 * torch.randn(len(weight), 2)
            layers[part] |= {f"{name}.lora_A.weight": down, f"{name}.lora_B.weight": up}
            merged[part][f"{name}.weight"] = weight + 0.5 * up @ down  # alpha is half the rank
    config = {"r": 2, "lora_alpha": 1, "target_modules": ["to_q"]}
    text_config = {"r": 2, "lora_alpha": 1, "target_modules": ["q_proj"]}
    type(pipe).save_lora_weights(
        root,
        unet_lora_layers=layers["unet"],
        text_encoder_lora_layers=layers["text_encoder"],
        unet_lora_adapter_metadata=config,
        text_encoder_lora_adapter_metadata=text_config,
    )
    return folder, str(root / LORA_FILE), merged


def load(*words):
    args = helpers.training_arguments("adm", [*words])
    return common.load_teacher_from(args, helpers.CPU)


def test_a_lora_is_merged_into_every_network_that_it_is_of(tuned):
    folder, file, merged = tuned
    teacher = load("--teacher", folder, "--teacher-lora", file)
    for part, state in merged.items():
        loaded = getattr(teacher.pipe, part).state_dict()
        assert loaded.keys() == state.keys()
        for name, weight in state.items():
            torch.testing.assert_close(loaded[name], weight, msg=f"{part} {name}")
    weights = teacher.network().state_dict()  # what a student trains from, once more of the files
    for name, weight in merged["unet"].items():
        torch.testing.assert_close(weights[name], weight)
    for name, weight in merged["text_encoder"].items():  # which are not merged twice
        torch.testing.assert_close(teacher.pipe.text_encoder.state_dict()[name], weight)
    assert not any(p.requires_grad for p in teacher.pipe.text_encoder.parameters())
    plain = load("--teacher", folder)
    assert not teacher.null(1)["encoder_hidden_states"].any()
    prompts = ["a red circle"]
    assert not teacher.encode(prompts)["encoder_hidden_states"].equal(
        plain.encode(prompts)["encoder_hidden_states"]
    )


def test_a_student_starts_from_a_fine_tune(tuned, tmp_path):
    """A folder that its own pipeline wrote is a teacher like any other."""
    plain = load("--teacher", tuned[0])
    before = plain.fingerprint
    weights = plain.denoiser.state_dict()
    last = "mid_block.attentions.0.transformer_blocks.0.attn1.to_v.weight"
    weights = weights | {last: 1.01 * weights[last]}  # in one layer alone
    plain.denoiser.load_state_dict(weights)
    plain.pipe.save_pretrained(tmp_path)
    teacher = load("--teacher", str(tmp_path))
    assert teacher.fingerprint != before
    assert all(weight.equal(weights[name]) for name, weight in teacher.network().state_dict().items())


def test_a_teachers_lora_is_part_of_its_fingerprint(tuned, tmp_path):
    """By what is in the file, whatever its name and whatever the precision."""
    folder, file, _ = tuned
    copy = str(tmp_path / "copy.safetensors")
    shutil.copyfile(file, copy)
    words = ["--teacher", folder, "--teacher-lora"]
    own = load(*words, file).fingerprint
    assert own == load(*words, copy, "--precision", "bf16").fingerprint
    tensors = load_file(file)
    tensors["unet.mid_block.attentions.0.transformer_blocks.0.attn1.to_q.lora_A.weight"] *= 1.001
    save_file(tensors, copy)
    assert own != load(*words, copy).fingerprint
    assert own != load("--teacher", folder).fingerprint


def test_a_student_of_a_tuned_teacher_needs_it(tuned, prompts_file, tmp_path, capsys, monkeypatch):
    """Trained with --lora, resumed, drawn and written as a LoRA file without naming the teacher again."""
    helpers.make_runs_comparable(monkeypatch.setattr)
    folder, file, merged = tuned
    run = str(tmp_path / "run")
    words = ["--teacher", folder, "--prompts", prompts_file, "--lora", "2", "--out", run, *helpers.QUICK]
    adm.main([*words, "--teacher-lora", file, "--iterations", "1"])
    with pytest.raises(UserError, match="its fingerprint is"):
        adm.main([*words, "--resume"])
    adm.main([*words, "--teacher-lora", file, "--resume"])
    draw = ["--prompt", helpers.PROMPT, "--out", str(tmp_path / "drawn"), "--student", run]
    sample.main(draw)
    with pytest.raises(UserError, match=f"was distilled from {folder} with {file}, not from {folder}$"):
        sample.main([*draw, "--teacher", folder])
    capsys.readouterr()
    sample.main(["--student", run, "--export-lora", str(tmp_path / "student.safetensors")])
    lines = capsys.readouterr().out.splitlines()
    assert f"pipe.load_lora_weights({file!r})" in lines
    assert "pipe.fuse_lora(components=['unet', 'text_encoder', 'text_encoder_2'])" in lines
    sample.main(["--student", run, "--export", str(tmp_path / "whole")])
    exported = DiffusionPipeline.from_pretrained(tmp_path / "whole").text_encoder.state_dict()
    for name, weight in merged["text_encoder"].items():
        torch.testing.assert_close(exported[name], weight)


@pytest.mark.parametrize("family", ("sdxl", "flux"))
def test_the_lines_merge_a_teachers_lora_into_all_its_networks(tmp_path, family):
    folder = helpers.make_teacher(tmp_path / "teacher", 0, family)
    pipe = helpers.load_teacher(folder, helpers.CPU).pipe
    torch.manual_seed(2)
    layers = {}
    for part in list_lora_parts(pipe):
        layers[f"{part}_lora_layers"] = own = {}
        ending = "q_proj" if part.startswith("text") else "to_q"
        for name, module in getattr(pipe, part).named_modules():
            if name.endswith(ending):
                own[f"{name}.lora_A.weight"] = torch.randn(2, module.in_features)
                own[f"{name}.lora_B.weight"] = torch.randn(module.out_features, 2)
    type(pipe).save_lora_weights(tmp_path, **layers)
    words = ["--teacher", folder, *helpers.size(family)]
    teacher = load(*words, "--teacher-lora", str(tmp_path / LORA_FILE))
    lines = write_lora_lines(common.Student(teacher, "teacher", 2), str(tmp_path / "student.safetensors"))
    scope = {}
    exec("\n".join(lines[:-3]), scope)  # without the student's
    assert len(layers) > 1
    for part in list_lora_parts(pipe):
        merged = getattr(scope["pipe"], part).state_dict()
        for name, weight in getattr(teacher.pipe, part).state_dict().items():
            torch.testing.assert_close(merged[name], weight)


def write_kohya(layers, file, alphas):
    """A LoRA in kohya's form: layers {name in the U-Net: (down, up)}, alphas a number for each."""
    tensors = {}
    for (name, (down, up)), alpha in zip(layers.items(), alphas):
        key = f"lora_unet_{name.replace('.', '_')}"
        tensors[f"{key}.lora_down.weight"] = down
        tensors[f"{key}.lora_up.weight"] = up
        tensors[f"{key}.alpha"] = torch.tensor(float(alpha))
    save_file(tensors, file)


def make_layers(net, ending):
    """Factors of rank 2 for the linear layers whose names end so -> {name: (down, up)}."""
    torch.manual_seed(4)
    layers = {}
    for name, module in net.named_modules():
        if name.endswith(ending):
            layers[name] = torch.randn(2, module.in_features), torch.randn(module.out_features, 2)
    return layers


@pytest.mark.parametrize("precision, stored", [("fp32", torch.float16), ("bf16", torch.float32)])
def test_a_lora_in_kohyas_form_is_merged_at_its_scale(tuned, tmp_path, precision, stored):
    """Whatever the precision of the file and of the teacher."""
    file = str(tmp_path / "kohya.safetensors")
    words = ["--teacher", tuned[0], "--precision", precision]
    before = load(*words).denoiser
    layers = {}
    for name, factors in make_layers(before, "attn1.to_q").items():
        layers[name] = tuple(factor.to(stored) for factor in factors)
    write_kohya(layers, file, [0.5] * len(layers))
    merged = load(*words, "--teacher-lora", file).denoiser
    for name, (down, up) in layers.items():
        expected = before.get_parameter(f"{name}.weight").float() + 0.25 * up.float() @ down.float()
        rtol = 1e-5 if precision == "fp32" else 0.05
        torch.testing.assert_close(
            merged.get_parameter(f"{name}.weight").float(), expected, rtol=rtol, atol=rtol
        )


def test_a_layer_whose_alpha_is_0_is_as_it_was(tuned, tmp_path):
    """As of blocks that somebody has switched off."""
    file = str(tmp_path / "kohya.safetensors")
    before = load("--teacher", tuned[0]).denoiser
    layers = make_layers(before, "ff.net.2")
    write_kohya(layers, file, [0] + [2] * (len(layers) - 1))
    merged = load("--teacher", tuned[0], "--teacher-lora", file).denoiser
    same = [merged.get_parameter(f"{n}.weight").equal(before.get_parameter(f"{n}.weight")) for n in layers]
    assert same == [True] + [False] * (len(layers) - 1)


@pytest.mark.parametrize("kind", ["lora_B.bias", "lora_magnitude_vector"])
def test_what_goes_with_a_layers_factors_is_merged_too(tuned, tmp_path, kind):
    """A bias, or the lengths that DoRA gives the rows of the merged weight."""
    file = str(tmp_path / "more.safetensors")
    before = load("--teacher", tuned[0]).denoiser
    layers = make_layers(before, "attn1.to_out.0")
    tensors = {}
    for name, (down, up) in layers.items():
        tensors |= {f"unet.{name}.lora_A.weight": down, f"unet.{name}.lora_B.weight": up}
        tensors[f"unet.{name}.{kind}"] = 1 + torch.rand(len(up))
    save_file(tensors, file)
    merged = load("--teacher", tuned[0], "--teacher-lora", file).denoiser
    for name, (down, up) in layers.items():
        weight = before.get_parameter(f"{name}.weight") + up @ down
        bias = before.get_parameter(f"{name}.bias")
        own = tensors[f"unet.{name}.{kind}"]
        if kind == "lora_B.bias":
            bias = bias + own
        else:
            weight = own[:, None] * weight / weight.norm(dim=1, keepdim=True)
        torch.testing.assert_close(merged.get_parameter(f"{name}.weight"), weight, rtol=1e-4, atol=1e-5)
        torch.testing.assert_close(merged.get_parameter(f"{name}.bias"), bias, rtol=1e-4, atol=1e-5)


def test_a_lora_that_diffusers_reads_otherwise_is_refused(tuned, tmp_path):
    """It warns, and gives attention layers the commonest alpha of all."""
    file = str(tmp_path / "kohya.safetensors")
    layers = make_layers(load("--teacher", tuned[0]).denoiser, "attn1.to_q")
    write_kohya(layers, file, [2.0] * (len(layers) - 1) + [1.0])
    with pytest.raises(
        UserError, match=r"cannot be merged: diffusers reads 1\.\d+ of its change, in squares"
    ):
        load("--teacher", tuned[0], "--teacher-lora", file)


@pytest.mark.parametrize(
    "change, sentence",
    [
        ("", ""),
        ("alpha", "cannot be merged: diffusers reads 4 of its change, in squares"),
        ("bias", "3 of its 3 biases find no place"),
        ("t5", "1 of its 4 layers find no place"),
    ],
)
def test_what_diffusers_passes_over_in_a_lora_of_flux_is_refused(tmp_path, change, sentence):
    """The alphas and biases of its own names with lora_down and lora_up, and all of T5."""
    folder = helpers.make_teacher(tmp_path / "teacher", 0, "flux")
    file = str(tmp_path / "flux.safetensors")
    pipe = helpers.load_teacher(folder, helpers.CPU).pipe
    tensors = {}
    for name, (down, up) in make_layers(pipe.transformer, "attn.to_q").items():
        tensors[f"transformer.{name}.lora_down.weight"] = down
        tensors[f"transformer.{name}.lora_up.weight"] = up
        tensors[f"transformer.{name}.alpha"] = torch.tensor(1.0 if change == "alpha" else 2.0)
        if change == "bias":
            tensors[f"transformer.{name}.diff_b"] = torch.ones(len(up))
    if change == "t5":
        for name, (down, up) in make_layers(pipe.text_encoder_2, "SelfAttention.q").items():
            key = f"lora_te3_{name.replace('.', '_')}"
            tensors |= {f"{key}.lora_down.weight": down, f"{key}.lora_up.weight": up}
    save_file(tensors, file)
    words = ["--teacher", folder, *helpers.size("flux"), "--teacher-lora", file]
    if change:
        with pytest.raises(UserError, match=sentence):
            load(*words)
    else:
        assert load(*words).lora == file


MISFITS = (
    ("missing.safetensors", "there is no file"),
    ("text.safetensors", "is no .safetensors file"),
    ("weights.safetensors", "is no LoRA"),
    ("nan.safetensors", "is damaged: unet"),
    ("nan-alpha.safetensors", "is damaged: unet.*alpha is not finite"),
    ("half.safetensors", "is damaged: unet.*to_q has lost one of its two factors"),
    ("ranks.safetensors", "is damaged: the factors of unet.*to_q are of two ranks"),
    ("other.safetensors", "does not fit the teacher"),
    ("kernel.safetensors", "is damaged: the factors of unet.*to_q are of two ranks"),
    ("float8.safetensors", "is in eight bits, as unet.*: convert it to bf16"),
    ("dora.safetensors", "is more than a LoRA: unet.*dora_scale is no low-rank factor"),
    ("norm.safetensors", "is more than a LoRA: unet.*norm1.diff is no low-rank factor"),
    ("bias.safetensors", "is more than a LoRA: the bias of unet.*norm1 is no low-rank factor"),
    ("raw.safetensors", "does not fit the teacher|cannot be merged"),
    ("sd3.safetensors", "does not fit the teacher: 1 of its 1 layers find no place in it"),
    ("more.safetensors", "does not fit the teacher: 1 of its"),
)


@pytest.mark.parametrize("name, sentence", MISFITS)
def test_files_that_are_no_lora_of_the_teacher_are_refused(
    tuned, tmp_path, monkeypatch, capfd, name, sentence
):
    """In one sentence, and without diffusers' own words beside it."""
    folder, file, _ = tuned
    monkeypatch.chdir(tmp_path)
    tensors = load_file(file)
    first = next(key for key in tensors if key.startswith("unet"))
    layer = first.partition(".lora_")[0]
    other = {key: weight[:, :-1] if "lora_A" in key else weight for key, weight in tensors.items()}
    raw = {key.replace(".weight", ".default.weight"): weight for key, weight in tensors.items()}
    down, up = torch.ones(2, 2), torch.ones(2, 2)
    pair = {"transformer.x.lora_A.weight": down, "transformer.x.lora_B.weight": up}
    more = {"unet.nowhere.lora_A.weight": down, "unet.nowhere.lora_B.weight": up}
    files = {
        "weights.safetensors": {"conv.weight": torch.ones(3, 3)},
        "nan.safetensors": tensors | {first: tensors[first] * float("nan")},
        "nan-alpha.safetensors": tensors | {f"{layer}.alpha": torch.tensor(float("nan"))},
        "half.safetensors": {key: weight for key, weight in tensors.items() if key != first},
        "ranks.safetensors": tensors | {first: tensors[first][:1]},
        "kernel.safetensors": tensors | {f"{layer}.lora_B.weight": torch.ones(8, 2, 3, 3)},
        "float8.safetensors": tensors | {first: tensors[first].to(torch.float8_e4m3fn)},
        "bias.safetensors": tensors | {f"{layer.rpartition('.')[0]}.norm1.diff_b": torch.ones(3)},
        "other.safetensors": other,
        "dora.safetensors": tensors | {f"{layer}.dora_scale": torch.ones(len(tensors[first]), 1)},
        "norm.safetensors": tensors | {f"{layer.rpartition('.')[0]}.norm1.diff": torch.ones(3)},
        "raw.safetensors": raw,
        "sd3.safetensors": pair,
        "more.safetensors": tensors | more,
    }
    (tmp_path / "text.safetensors").write_text("no tensors")
    if name in files:
        save_file({key: weight.contiguous() for key, weight in files[name].items()}, name)
    with pytest.raises(UserError, match=sentence) as caught:
        load("--teacher", folder, "--teacher-lora", name)
    assert "\n" not in str(caught.value)
    assert capfd.readouterr() == ("", "")


def test_adapters_train_in_float32(teacher_folder):
    """On a teacher in bf16, too."""
    teacher = helpers.load_teacher(teacher_folder, torch.device("cpu"), torch.bfloat16)
    adapted = Adapted(teacher.denoiser, "student", 2)
    assert {weight.dtype for weight in adapted.parameters()} == {torch.float32}


def test_an_adapter_of_other_layers_does_not_go_on(adm_arguments, tmp_path):
    """Be they of the same shapes."""
    words = [*adm_arguments, *f"--loss dmd --steps 1 --lora 2 --out {tmp_path / 'run'}".split()]
    adm.main([*words, "--lora-targets", "attn1.to_q", "--iterations", "1"])
    with pytest.raises(UserError, match="its --lora-targets is"):
        adm.main([*words, "--lora-targets", "attn1.to_k", "--iterations", "2", "--resume"])
