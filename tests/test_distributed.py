"""Several processes do what one does: the same losses for the same global batch, the same ODE pairs."""

import os
import shutil
import subprocess
import sys
import threading
import warnings
from dataclasses import dataclass
from types import SimpleNamespace

import pytest
import torch
import torch.distributed as dist
from forks import Command
from torch.distributed.optim import ZeroRedundancyOptimizer

import adm
import adp
import common
import helpers
from support import parallel, run
from support.checkpoints import LORA_FILE, find_checkpoint
from support.errors import UserError
from support.offload import TOGETHER
from support.parallel import leave_together
from support.training import minimise, prepare
from tiny import families
from tools.bench import free_port

TESTS = os.path.dirname(os.path.abspath(__file__))
STEPS = 2
ADP = f"--warmup 1 --iterations {STEPS}"
# A long step dt, because the gap of two almost equal samples is mostly rounding.
ADM = f"--dt 0.25 --iterations {STEPS}"
LORA = "--lora 4 --dt 0.25 --iterations 5"  # an adapter's start is slow


@dataclass
class Setting:
    """A training run that is made twice, in one process and in several."""

    stage: str  # "adp" or "adm"
    family: str
    options: str
    of_several: str = ""  # options of several processes alone


RUNS = {
    "adm --ttur 2 --steps 2": Setting("adm", "sdxl", f"--ttur 2 --steps 2 {ADM}"),
    "dmd": Setting("adm", "sdxl", f"--loss dmd {ADM}"),
    "adm lora": Setting("adm", "sd3", LORA),
    "adm lora fsdp": Setting("adm", "cogvideox", f"{LORA} --lr 1e-3 --fake-lr 1e-3", "--shard fsdp"),
    "adm fsdp, accumulated, scored": Setting(
        "adm", "sd3", f"--ema 0.5 --eval-every 2 {ADM}", "--shard fsdp --batch 1 --accumulate 2"
    ),
}
for shard in ("ddp", "zero1", "fsdp"):
    RUNS[f"adp sdxl {shard}"] = Setting("adp", "sdxl", ADP, f"--shard {shard}")
    RUNS[f"adm sdxl {shard}"] = Setting("adm", "sdxl", f"--ema 0.5 {ADM}", f"--shard {shard}")
# the others' blocks are sharded each in its own way; what DDP wants of them is in tests/test_gradients.py
RUNS["adp sd3 fsdp"] = Setting("adp", "sd3", ADP, "--shard fsdp")
RUNS["adp cogvideox fsdp"] = Setting(
    "adp", "cogvideox", f"{ADP} --lambda-latent 1 --lambda-pixel 0", "--shard fsdp"
)
for family in ("sd3", "cogvideox", *families.FAMILIES):
    if family == "stable-diffusion":  # whose blocks are SDXL's
        continue
    RUNS[f"adm {family} fsdp"] = Setting("adm", family, f"--steps 2 {ADM} --iterations 1", "--shard fsdp")

# ----------------------------------------------------------------------------------------------------------
# Runs
# ----------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module", autouse=True)
def comparable():
    with pytest.MonkeyPatch.context() as patch:
        helpers.make_runs_comparable(patch.setattr)
        yield


@pytest.fixture(scope="module")
def arguments_of(tmp_path_factory, prompts_file, adp_arguments, adm_arguments):
    """A function: the name of a run -> its arguments."""
    shared = {"adp": adp_arguments, "adm": adm_arguments}
    sources = {"sdxl": {"adp": [], "adm": []}}
    held_out = tmp_path_factory.mktemp("held-out") / "prompts.txt"
    held_out.write_text("a circle\na small square\na red triangle\n")  # no multiple of the ranks
    for family in ("sd3", "cogvideox"):
        folder = tmp_path_factory.mktemp(family)
        teacher = helpers.make_teacher(folder / "teacher", 0, family)
        pairs = str(folder / "pairs")
        words = ["--teacher", teacher, "--prompts", prompts_file, "--out", pairs]
        helpers.collect(*words, "--count", "8", "--steps", "1")
        sources[family] = {
            "adp": ["--teacher", teacher, "--pairs", pairs],
            "adm": ["--teacher", teacher],
        }
    for family in families.FAMILIES:
        teacher = helpers.make_teacher(tmp_path_factory.mktemp(family) / "teacher", 0, family)
        sources[family] = {"adm": ["--teacher", teacher, *helpers.size(family)]}

    def find(name):
        setting = RUNS[name]
        source = sources[setting.family][setting.stage]
        return shared[setting.stage] + source + setting.options.split() + ["--eval-prompts", str(held_out)]

    return find


def main_of(name):
    return {"adp": adp.main, "adm": adm.main}[RUNS[name].stage]


@pytest.fixture(scope="module")
def run_in_processes(tmp_path_factory, arguments_of):
    """A function: how many processes, the name of a run -> its folder."""
    folders = {}

    def run(count, name):
        if (count, name) not in folders:
            folder = tmp_path_factory.mktemp(f"processes{count}")
            setting = RUNS[name]
            words = [*arguments_of(name), "--out", str(folder), "--batch", str(4 // count)]
            run_ranks(setting.stage, [*words, *setting.of_several.split()], count, folder.parent)
            folders[count, name] = folder
        return folders[count, name]

    return run


def run_ranks(stage, words, count, place, nodes=1):
    running = Command(stage, words, count, nodes).run(place)
    assert not any(running.codes.values()), running.read()


@pytest.fixture(scope="module")
def run_alone(tmp_path_factory, arguments_of):
    """A function: the name of a run -> its folder, made by one process; --shard says nothing to it, so that
    three runs are one."""
    folders = {}

    def run(name):
        setting = RUNS[name]
        key = (setting.stage, setting.family, setting.options)
        if key not in folders:
            folders[key] = tmp_path_factory.mktemp("alone")
            main_of(name)([*arguments_of(name), "--out", str(folders[key]), "--batch", "4"])
        return folders[key]

    return run


def compare(one, other):
    """Two runs' losses of every iteration, their weights at the end, and their gradients, whose averages
    Adam keeps."""
    for line, other_line in zip(helpers.read_metrics(one), helpers.read_metrics(other), strict=True):
        for name in line:
            tolerance = 1e-4 if name.startswith("norm") else 1e-5
            slack = 1e-3 if name in ("cosine", "across") else 1e-5  # ratios of small numbers
            assert other_line[name] == pytest.approx(line[name], rel=tolerance, abs=slack), name
    state, other_state = (helpers.read_state(find_checkpoint(str(run))[0]) for run in (one, other))
    assert state.keys() == other_state.keys()
    for name in state:
        if not name.startswith("opt"):
            torch.testing.assert_close(state[name], other_state[name], rtol=0, atol=1e-6)
        elif state[name]["state"]:
            gradient, moved = helpers.read_adam(state[name])
            other_gradient, _ = helpers.read_adam(other_state[name])
            assert gradient.norm() > 1e-4, name
            assert (gradient - other_gradient).norm() < 1e-3 * gradient.norm(), name
            assert moved > 1e-5, name


# ----------------------------------------------------------------------------------------------------------
# Training
# ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", RUNS)
def test_two_processes_lose_what_one_does(run_in_processes, run_alone, name):
    compare(run_alone(name), run_in_processes(2, name))


@pytest.mark.slow
def test_two_processes_in_bf16_lose_about_what_one_does(arguments_of, tmp_path):
    """Of Wan's weights some are in bf16 and some in float32, in one exchange."""
    words = [*arguments_of("adm wan fsdp"), "--precision", "bf16"]
    adm.main([*words, "--out", str(tmp_path / "one"), "--batch", "4"])
    run_ranks("adm", [*words, "--out", str(tmp_path / "two"), "--batch", "2", "--shard", "fsdp"], 2, tmp_path)
    (one,), (two,) = (helpers.read_metrics(tmp_path / name) for name in ("one", "two"))
    for name in ("loss_f", "norm_f", "dmd_loss", "std", "norm_G", "loss_D", "norm_D"):
        assert two[name] == pytest.approx(one[name], rel=0.05), name


@pytest.mark.slow
def test_four_processes_lose_what_one_does(run_in_processes, run_alone):
    compare(run_alone("adm sdxl ddp"), run_in_processes(4, "adm sdxl ddp"))


@pytest.mark.parametrize("name", ("adp sdxl ddp", "adm sdxl ddp", "adm --ttur 2 --steps 2", "dmd"))
def test_micro_batches_lose_what_one_batch_does(arguments_of, run_alone, tmp_path, name):
    main_of(name)([*arguments_of(name), "--out", str(tmp_path), "--batch", "1", "--accumulate", "4"])
    compare(run_alone(name), tmp_path)


@pytest.mark.slow
def test_compiled_blocks_do_what_they_do_uncompiled(arguments_of, run_alone, tmp_path, monkeypatch):
    """Traced as for the card's compiler, then run as they are: building kernels takes minutes."""
    traced = []
    compile_module = torch.nn.Module.compile

    def compile_eagerly(block):
        traced.append(block)
        compile_module(block, backend="eager")

    monkeypatch.setattr(torch.nn.Module, "compile", compile_eagerly)
    adm.main([*arguments_of("dmd"), "--out", str(tmp_path), "--batch", "4", "--compile"])
    # the inner ones: the U-Net's up blocks are made of these
    assert {type(block).__name__ for block in traced} == {"BasicTransformerBlock", "ResnetBlock2D"}
    assert all(block._compiled_call_impl for block in traced)
    compare(run_alone("dmd"), tmp_path)


def test_lora_leaves_the_backbone_as_it_was_and_saves_what_it_trains(arguments_of, tmp_path, monkeypatch):
    """A student of adapters alone: the plain network that is saved does what backbone and adapter do."""
    methods = []
    save = run.Run.save

    def keep_method(self, *arguments):
        methods.append(self.method)
        save(self, *arguments)

    monkeypatch.setattr(run.Run, "save", keep_method)
    words = ["--out", str(tmp_path), "--lr", "1e-2", "--head-lr", "1e-2"]
    adm.main([*arguments_of("adm lora"), *words])
    method = methods[-1]
    teacher = method.teacher
    fresh = helpers.load_teacher(teacher.path, teacher.device)
    weights = {}
    for name, weight in teacher.denoiser.state_dict().items():
        if "lora_" not in name:
            weights[name.replace(".base_layer", "")] = weight
    fresh_weights = fresh.denoiser.state_dict()
    assert weights.keys() == fresh_weights.keys()
    assert all(weight.equal(weights[name]) for name, weight in fresh_weights.items())

    saved, *_ = helpers.load_student(str(tmp_path), fresh)
    x = torch.randn(2, *teacher.latent_shape)
    t = torch.tensor([300.0, 900.0])
    cond = teacher.encode(["a red circle", "a square"])
    of_adapter = teacher.call(method.G, x, t, cond)
    of_saved = teacher.call(saved, x, t, cond)
    of_backbone = teacher.call(teacher.denoiser, x, t, cond)
    torch.testing.assert_close(of_adapter, of_saved, rtol=1e-4, atol=1e-5)
    assert (of_adapter - of_backbone).abs().max() > 1e-2
    assert of_backbone.equal(fresh.call(fresh.denoiser, x, t, cond))

    checkpoint, meta = find_checkpoint(str(tmp_path))
    assert {LORA_FILE, "scheduler/scheduler_config.json"} < set(meta["files"])
    fresh.pipe.load_lora_weights(checkpoint)
    of_file = fresh.call(fresh.denoiser, x, t, cond)
    torch.testing.assert_close(of_adapter, of_file, rtol=1e-4, atol=1e-5)
    scheduler = method.student.scheduler()
    kept = type(scheduler).from_pretrained(checkpoint, subfolder="scheduler")
    assert all(kept.config[name] == value for name, value in scheduler.config.items() if name[0] != "_")


def test_lora_goes_on_from_lora_alone(arguments_of, run_alone, tmp_path):
    words = [*arguments_of("adm lora"), "--iterations", "1"]
    lora = str(run_alone("adm lora"))
    full, on = (str(tmp_path / name) for name in ("full", "on"))
    adm.main([*words, "--out", full, "--lora", "0"])
    adm.main([*words, "--out", on, "--init", lora, "--lr", "0"])
    before = helpers.read_state(os.path.join(lora, "step_000005"))["G"]
    after = helpers.read_state(os.path.join(on, "step_000001"))["G"]
    assert any(weight.any() for weight in before.values())
    assert all(weight.equal(after[name]) for name, weight in before.items())
    for options in (["--init", full], ["--init", lora, "--lora", "2"]):
        with pytest.raises(UserError, match="of the same --lora"):
            adm.main([*words, "--out", str(tmp_path / "refused"), *options])


@pytest.mark.parametrize("name", ("adp sdxl ddp", "adm --ttur 2 --steps 2"))
def test_offloading_changes_where_prompts_are_encoded_and_nothing_else(
    arguments_of, run_alone, tmp_path, name, monkeypatch
):
    here = run_alone(name)
    encoded = []
    encode = common.SDXL._encode

    def count(teacher, prompts):
        encoded.append(len(prompts))
        return encode(teacher, prompts)

    monkeypatch.setattr(common.SDXL, "_encode", count)
    main_of(name)([*arguments_of(name), "--out", str(tmp_path), "--batch", "4", "--offload"])
    compare(here, tmp_path)  # but for rounding: other rows are beside a prompt
    assert max(encoded) <= TOGETHER
    assert sum(encoded) <= 2 + 20  # the trial, the null prompt, each prompt of the file once


COMPARABLE = """
import sys
sys.path[:0] = {folders!r}
import adm, helpers
from support.errors import launch
helpers.make_runs_comparable()
launch(lambda: adm.main({arguments!r}))
"""


@pytest.mark.slow
def test_two_torchruns_are_two_nodes(arguments_of, run_alone, tmp_path):
    command = [*arguments_of("dmd"), "--out", str(tmp_path / "two"), "--batch", "2"]
    script = tmp_path / "run.py"
    script.write_text(COMPARABLE.format(folders=[helpers.ROOT, TESTS], arguments=command))
    place = ["--nnodes=2", "--nproc_per_node=1", "--master_addr=127.0.0.1", f"--master_port={free_port()}"]
    nodes = []
    for node in range(2):
        torchrun = [sys.executable, "-m", "torch.distributed.run", *place, f"--node_rank={node}", str(script)]
        pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT, "text": True}
        nodes.append(subprocess.Popen(torchrun, cwd=helpers.ROOT, **pipes))
    said = [node.communicate(timeout=300)[0] for node in nodes]
    assert [node.returncode for node in nodes] == [0, 0], said
    assert "dmd_loss" in said[0]  # rank 0 alone shows its progress
    assert "dmd_loss" not in said[1]
    compare(run_alone("dmd"), tmp_path / "two")


@pytest.fixture
def group_of_one():
    """This process is the only rank of a group."""
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    yield
    dist.destroy_process_group()


def test_a_rank_that_hangs_in_an_iteration_is_not_waited_for_as_a_checkpoint_is(
    arguments_of, tmp_path, monkeypatch, group_of_one
):
    """The first iteration may compile; then each has half an hour, and what follows it four."""
    told = []
    monkeypatch.setattr(dist, "set_timeout", lambda timeout, group: told.append(timeout.seconds))
    adm.main([*arguments_of("dmd"), "--out", str(tmp_path), "--batch", "4", "--iterations", "3"])
    hours, minutes = 4 * 3600, 30 * 60
    assert told == [hours, minutes, hours, minutes, hours]


def test_all_groups_of_nodes_that_share_hear_how_long_to_wait(monkeypatch, group_of_one):
    heard = []
    layout = SimpleNamespace(get_all_groups=lambda: ["copies", "sharing"])
    monkeypatch.setattr(parallel, "lay_out_nodes", lambda: layout)
    monkeypatch.setattr(dist, "set_timeout", lambda timeout, group: heard.append(group))
    for shard in ("hsdp", "fsdp"):
        parallel.set_patience(parallel.PATIENCE, SimpleNamespace(shard=shard))
    assert heard == [dist.group.WORLD, "copies", "sharing", dist.group.WORLD]


def test_micro_batches_add_up_in_the_buckets_of_ddp(group_of_one):
    """Gradients beside them would take 4 bytes a parameter."""
    net = torch.nn.Sequential(torch.nn.Linear(4, 4), torch.nn.Linear(4, 4))
    args = SimpleNamespace(betas=(0.9, 0.99), weight_decay=0, shard="ddp")
    train, optimizer = prepare(net, 0.1, args)
    storages = []

    def loss_of(x):
        storages.append({p.grad.untyped_storage().data_ptr() for p in net.parameters()})
        return train(x).square().mean()

    for _ in range(3):
        minimise(loss_of, [torch.ones(1, 4), torch.ones(2, 4)], train, optimizer, 1.0)
    assert [len(found) for found in storages[1:]] == [1] * 5  # the first has what DDP has not seen yet


@pytest.mark.parametrize("shard", ("ddp", "zero1", "fsdp", "hsdp"))
def test_what_is_not_sharded_shares_its_optimisers_states(group_of_one, shard):
    """Heads and adapters, as the plan has them."""
    args = SimpleNamespace(betas=(0.9, 0.99), weight_decay=0, shard=shard)
    _, optimizer = prepare(torch.nn.Linear(4, 4), 0.1, args)
    assert isinstance(optimizer, ZeroRedundancyOptimizer) == (shard != "ddp")


def test_a_share_of_a_network_runs_in_bf16_and_is_told_its_time_in_full(group_of_one):
    """A time of 999 is 1000 in bf16."""

    class Net(torch.nn.Module):
        _no_split_modules = ()
        _keep_in_fp32_modules = None

        def __init__(self):
            super().__init__()
            self.layer = torch.nn.Linear(4, 4)

        def forward(self, x, t):
            self.told = t.item()
            self.used = self.layer.weight.dtype
            return self.layer(x.to(self.used))

    net = parallel.shard(Net(), SimpleNamespace(shard="fsdp"), torch.bfloat16)
    net(torch.ones(1, 4), torch.tensor(999.0)).sum().backward()
    state = net._get_fsdp_state()
    assert (net.told, net.used) == (999, torch.bfloat16)
    assert state._mp_policy.reduce_dtype == torch.float32
    assert net.layer.weight.grad.dtype == torch.float32


@pytest.mark.parametrize("family", ("wan", "flux"))
def test_a_shared_fake_score_starts_as_the_teacher(group_of_one, tmp_path, family):
    """To the last bit in bf16, where Wan's tables stay in float32; and nothing alarms who trains it: FLUX's
    blocks return slices."""
    folder = helpers.make_teacher(tmp_path, 0, family)
    words = ["--teacher", folder, *helpers.size(family), "--precision", "bf16", "--no-checkpointing"]
    args = helpers.training_arguments("adm", words)
    args.shard = "fsdp"  # which the command line takes from several processes
    teacher = common.load_training_teacher(args, helpers.CPU)
    fake = teacher.trainable(args, "fake")
    assert all(p.dtype == torch.float32 for p in fake.parameters())
    x = torch.randn(1, *teacher.latent_shape, generator=torch.Generator().manual_seed(0))
    t = torch.tensor([600.0])
    with warnings.catch_warnings(record=True) as told:
        raw = teacher.raw(fake, x, t, teacher.null(1))
    with torch.no_grad():
        expected = teacher.raw(teacher.denoiser, x, t, teacher.null(1))
    assert raw.requires_grad
    assert raw.equal(expected)
    assert not [warning for warning in told if "FSDP" in str(warning.message)]


def test_nodes_add_up_gradients_once_an_update(monkeypatch):
    """With --shard hsdp and --accumulate."""
    net = torch.nn.Linear(4, 4)
    exchanges = []
    monkeypatch.setattr(parallel, "FSDPModule", torch.nn.Linear)
    net.set_requires_all_reduce = exchanges.append
    optimizer = torch.optim.AdamW(net.parameters())
    minimise(lambda x: net(x).mean(), list(torch.ones(3, 1, 4)), net, optimizer, 1.0)
    assert exchanges == [False, False, True]


def test_a_rank_has_the_gpu_of_its_place_on_its_node(monkeypatch):
    taken = []
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 4)
    monkeypatch.setattr(torch.cuda, "set_device", taken.append)
    monkeypatch.setenv("RANK", "10")
    monkeypatch.setenv("LOCAL_RANK", "1")
    assert parallel.own_device() == torch.device("cuda", 1)
    monkeypatch.delenv("LOCAL_RANK")  # srun sets none
    assert parallel.own_device() == torch.device("cuda", 2)
    assert taken == [torch.device("cuda", 1), torch.device("cuda", 2)]


@pytest.mark.parametrize("numbers, same", (([5, 5, 5], True), ([4, 5, 6], False), ([5, 5, 6], False)))
def test_every_rank_hears_whether_all_agree(monkeypatch, numbers, same):
    """Also the one whose number is the mean of them all."""
    monkeypatch.setattr(dist, "is_initialized", lambda: True)
    monkeypatch.setenv("WORLD_SIZE", "3")
    monkeypatch.setenv("RANK", "1")
    own = []

    def add_up(x):
        own.append(x.tolist())
        return torch.tensor(numbers, dtype=x.dtype)

    monkeypatch.setattr(parallel, "add_up", add_up)
    assert parallel.agree(numbers[1]) == same
    assert own == [[0, numbers[1], 0]]


def test_nodes_that_share_no_group_leave_together(monkeypatch):
    port = free_port()
    store = dist.TCPStore("127.0.0.1", port, is_master=True, wait_for_workers=False)
    place = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "TORCHELASTIC_USE_AGENT_STORE": "True"}
    ranks = {"WORLD_SIZE": "2", "LOCAL_WORLD_SIZE": "1", "TORCHELASTIC_RESTART_COUNT": "1"}
    for name, value in {**place, **ranks}.items():
        monkeypatch.setenv(name, value)
    store.add("dmdx/0/done", 1)  # of before a restart: the store outlives it
    first = threading.Thread(target=leave_together, daemon=True)
    first.start()
    while store.add("dmdx/1/done", 0) < 1:
        first.join(0.01)
    first.join(0.1)
    assert first.is_alive()
    leave_together()
    first.join(60)
    assert not first.is_alive()


def test_processes_of_one_node_leave_alone(monkeypatch):
    """torchrun waits for them all. There is no store at port 1."""
    monkeypatch.setenv("TORCHELASTIC_USE_AGENT_STORE", "True")
    monkeypatch.setenv("MASTER_PORT", "1")
    monkeypatch.setenv("WORLD_SIZE", "2")
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "2")
    monkeypatch.delenv("MASTER_ADDR", raising=False)
    leave_together()


FAILING = """
import os, sys
sys.path.insert(0, {root!r})
import adm
from support.run import Run
log = Run.log

def fail(run, step):
    log(run, step)
    if step == 2 and os.environ["RANK"] == "1":
        raise ValueError("the second process is out of luck")

Run.log = fail
adm.main({arguments!r})
"""


@pytest.mark.slow
def test_one_failing_process_ends_all_with_its_own_error(arguments_of, tmp_path):
    arguments = [*arguments_of("dmd"), "--out", str(tmp_path / "run"), "--iterations", "1000"]
    script = tmp_path / "failing.py"
    script.write_text(FAILING.format(root=helpers.ROOT, arguments=arguments))
    result = helpers.run_script(str(script), processes=2, timeout=120)
    assert result.returncode == 1
    assert "ValueError: the second process is out of luck" in result.stderr


@pytest.fixture(scope="module")
def whole(tmp_path_factory, arguments_of):
    """The words of an iteration more than "adm sdxl ddp" has -> (the words, its folder in one process)."""
    folder = tmp_path_factory.mktemp("whole")
    words = [*arguments_of("adm sdxl ddp"), "--iterations", str(STEPS + 1)]
    adm.main([*words, "--out", str(folder), "--batch", "4"])
    return [*words, "--resume"], folder


def test_a_sharded_run_goes_on_in_any_number_of_processes(run_in_processes, whole, tmp_path):
    """Two processes, then one or two: as if it had been one from the start."""
    words, alone = whole
    fsdp = shutil.copytree(run_in_processes(2, "adm sdxl fsdp"), tmp_path / "fsdp")
    adm.main([*words, "--out", str(fsdp), "--batch", "4"])
    compare(alone, fsdp)
    zero1 = shutil.copytree(run_in_processes(2, "adm sdxl zero1"), tmp_path / "zero1")
    run_ranks("adm", [*words, "--out", str(zero1), "--batch", "2", "--shard", "zero1"], 2, tmp_path)
    compare(alone, zero1)


@pytest.mark.slow
def test_a_run_goes_on_where_each_node_shares_for_itself(
    run_in_processes, run_alone, whole, tmp_path, monkeypatch
):
    """--shard hsdp on two nodes: of each weight a rank has half, not a quarter, and all learn from all
    samples, of two micro-batches."""
    fully_shard = parallel.fully_shard

    def shard_and_look(module, **options):
        fully_shard(module, **options)
        assert all(abs(2 * len(p.to_local()) - len(p)) <= 1 for p in module.parameters())

    monkeypatch.setattr(parallel, "fully_shard", shard_and_look)
    words = [*whole[0], "--accumulate", "2"]
    alone = shutil.copytree(run_alone("adm sdxl ddp"), tmp_path / "alone")
    adm.main([*words, "--out", str(alone), "--batch", "4"])
    hsdp = shutil.copytree(run_in_processes(2, "adm sdxl fsdp"), tmp_path / "hsdp")
    run_ranks("adm", [*words, "--out", str(hsdp), "--batch", "1", "--shard", "hsdp"], 4, tmp_path, nodes=2)
    compare(alone, hsdp)


# ----------------------------------------------------------------------------------------------------------
# ODE pairs
# ----------------------------------------------------------------------------------------------------------

SHARDS = [f"{k:05d}.safetensors" for k in range(5)]


@pytest.fixture
def collect_arguments(teacher_folder, prompts_file):
    words = "--count 9 --shard-size 2 --steps 2 --batch 2"
    return ["--teacher", teacher_folder, "--prompts", prompts_file, *words.split()]


def test_two_processes_collect_the_same_pairs(collect_arguments, tmp_path):
    helpers.collect(*collect_arguments, "--out", str(tmp_path / "one"))
    run_ranks("collect_ode", [*collect_arguments, "--out", str(tmp_path / "two")], 2, tmp_path)
    found = []
    for name in ("one", "two"):
        snapshot = helpers.take_snapshot(tmp_path / name)
        found.append({os.path.basename(path): digest for path, digest in snapshot.items()})
    assert found[0] == found[1]
    assert set(found[0]) == {"index.json", *SHARDS}


def test_shares_are_for_several_processes(adm_arguments, capsys, monkeypatch):
    words = [*adm_arguments, "--shard", "fsdp"]
    assert helpers.training_arguments("adm", words).shard == "ddp"
    assert "one process has nobody to share with" in capsys.readouterr().err
    monkeypatch.setenv("WORLD_SIZE", "2")
    assert helpers.training_arguments("adm", words).shard == "fsdp"
    assert "nobody" not in capsys.readouterr().err


@pytest.mark.parametrize(
    "ranks, of_node, options, shard, says",
    (
        (4, 2, [], "hsdp", ""),
        (4, 4, [], "fsdp", "one node has no other to copy"),
        (4, 1, [], "ddp", "one process a node has nobody to share with"),
        (5, 2, [], None, "wants as many processes on every node, not 5 in nodes of 2"),
        (4, 2, ["--lora", "4"], None, "with --lora give --shard fsdp"),
        (1, 1, ["--plan", "32"], "hsdp", ""),
        (1, 1, ["--plan", "8"], "fsdp", "one node has no other to copy"),
        (1, 1, ["--plan", "12"], None, "not 12 in nodes of 8"),
    ),
)
def test_nodes_share_each_for_itself_where_there_are_several(
    ranks, of_node, options, shard, says, adm_arguments, capsys, monkeypatch
):
    monkeypatch.setenv("WORLD_SIZE", str(ranks))
    monkeypatch.setenv("LOCAL_WORLD_SIZE", str(of_node))
    words = [*adm_arguments, "--shard", "hsdp", *options]
    if shard:
        assert helpers.training_arguments("adm", words).shard == shard
    else:
        with pytest.raises(SystemExit) as end:
            helpers.training_arguments("adm", words)
        assert end.value.code == 2
    assert says in capsys.readouterr().err


def test_processes_without_a_shard_are_told_of(collect_arguments, tmp_path, monkeypatch, capsys):
    monkeypatch.setenv("WORLD_SIZE", "8")
    helpers.collect(*collect_arguments, "--out", str(tmp_path / "few"))
    assert "5 shards leave 3 of the processes without work" in capsys.readouterr().err
    monkeypatch.setenv("WORLD_SIZE", "5")
    helpers.collect(*collect_arguments, "--out", str(tmp_path / "enough"))
    assert "without work" not in capsys.readouterr().err


def test_all_shards_are_made_when_one_process_is_late(collect_arguments, tmp_path, monkeypatch):
    """The second process looks for work after the first has finished all of its own."""
    monkeypatch.setenv("WORLD_SIZE", "2")
    for rank in ("0", "1"):
        monkeypatch.setenv("RANK", rank)
        helpers.collect(*collect_arguments, "--out", str(tmp_path))
    assert sorted(os.listdir(tmp_path)) == [*SHARDS, "index.json"]


def test_missing_and_damaged_shards_are_made_again_and_no_other(collect_arguments, tmp_path):
    arguments = [*collect_arguments, "--out", str(tmp_path)]
    helpers.collect(*arguments)
    before = helpers.take_snapshot(tmp_path)
    ages = {name: os.stat(tmp_path / name).st_mtime_ns for name in os.listdir(tmp_path)}
    os.remove(tmp_path / SHARDS[1])
    os.truncate(tmp_path / SHARDS[3], 1000)
    helpers.collect(*arguments)
    assert helpers.take_snapshot(tmp_path) == before
    changed = {name for name, age in ages.items() if os.stat(tmp_path / name).st_mtime_ns != age}
    assert changed - {"index.json"} == {SHARDS[1], SHARDS[3]}
