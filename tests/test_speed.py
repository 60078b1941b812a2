"""What makes it fast changes nothing: kept casts, settings of the processor, memory."""

from random import Random

import cli
import model
import pytest
import rlhf
import torch
from conftest import gpt, lively, log, scalar, settings
from model import GPT, PRESETS, GPTConfig, like_lengths, ragged
from torch import tensor


# ---- decoding ----------------------------------------------------------------------------------

@pytest.fixture
def reordered(monkeypatch) -> list:
    """Every weight that oneDNN is asked to lay out."""
    seen, reorder = [], torch.ops.mkldnn._reorder_linear_weight
    monkeypatch.setattr(torch.ops.mkldnn, "_reorder_linear_weight",
                        lambda weight: seen.append(weight) or reorder(weight))
    return seen


needs_onednn = pytest.mark.skipif(not torch.backends.mkldnn.is_available(), reason="no oneDNN")


@needs_onednn
@pytest.mark.parametrize("half, tolerance", [(False, 1e-5), (True, 2e-2)])
def test_weights_laid_out_once_give_the_same_products(half, tolerance, prompts, reordered):
    policy = gpt(vocab_size=64, n_embd=32)
    x, wide = torch.randn(3, 1, 32), torch.randn(3, 2, 128)
    layers = [(policy.h[0].attn.c_attn, x), (policy.h[1].mlp.c_proj, wide), (policy.h[0].mlp, x)]
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16, half, cache_enabled=False):
        plain = [policy.unembed(x), *(layer(own) for layer, own in layers)]
        with cli.constant_weights(policy):
            laid_out = [policy.unembed(x), *(layer(own) for layer, own in layers)]
            assert len(reordered) == 1 + 4 * policy.config.n_layer  # all of them, each once
    for one, other in zip(plain, laid_out):
        assert one.dtype == other.dtype == (torch.bfloat16 if half else torch.float32)
        torch.testing.assert_close(one, other, rtol=tolerance, atol=tolerance)


@needs_onednn
def test_complete_lays_weights_out_once_for_all_steps_and_chunks(prompts, reordered):
    policy = gpt(vocab_size=64, n_embd=32)
    rlhf.complete(policy, prompts * 200, -1, 4)
    assert len(prompts * 200) > 256 and len(reordered) == 1 + 4 * policy.config.n_layer


@needs_onednn
@pytest.mark.parametrize("half, module, name", [
    (False, torch.backends.mkldnn, "is_available"),
    (True, torch.ops.mkldnn, "_is_mkldnn_bf16_supported")])
def test_weights_that_onednn_does_not_take_are_left_as_they_are(
    half, module, name, monkeypatch, prompts, reordered
):
    policy = gpt(vocab_size=64, n_embd=32)
    monkeypatch.setattr(module, name, lambda: False)
    with torch.autocast("cpu", torch.bfloat16, half, cache_enabled=False):
        rlhf.complete(policy, prompts, -1, 4)
    assert not reordered


@pytest.mark.parametrize("half", [False, True])
def test_a_weight_that_changed_is_read_again(half, prompts):
    """What `complete` keeps of the weights must not outlive it, nor an error within it."""
    policy = gpt(vocab_size=64, n_embd=32)
    with torch.autocast("cpu", torch.bfloat16, half, cache_enabled=False):
        rlhf.complete(policy, prompts, -1, 4)
        before = rlhf.complete(policy, prompts, -1, 4, temperature=0)[0]
        with pytest.raises(ValueError, match="prompts of"):
            rlhf.complete(policy, prompts, -1, 10_000)
        assert not torch.is_autocast_cache_enabled() and "unembed" not in vars(policy)
        assert not any("forward" in vars(module) for module in policy.modules())
        lively(policy)
        after = rlhf.complete(policy, prompts, -1, 4, temperature=0)[0]
        same = gpt(vocab_size=64, n_embd=32)
        same.load_state_dict(policy.state_dict())
        fresh = rlhf.complete(same, prompts, -1, 4, temperature=0)[0]
    assert torch.equal(after, fresh) and not torch.equal(after, before)


# ---- padding -------------------------------------------------------------------------------------

@pytest.mark.parametrize("lens, groups", [
    ([9], [[9]]),
    ([10] * 4 + [74] * 4, [[10] * 4 + [74] * 4]),  # 256 places of padding: one group
    ([10] * 4 + [75] * 4, [[10] * 4, [75] * 4]),  # 260: two are cheaper
    ([1, 600, 1200], [[1], [600], [1200]]),
])
def test_rows_of_like_length_share_a_group(lens, groups):
    shuffled = Random(0).sample(lens, len(lens))
    found = like_lengths(range(len(lens)), shuffled)
    assert [[shuffled[i] for i in part] for part in found] == groups
    assert sorted(sum(found, [])) == [*range(len(lens))]


LENGTHS = {"alike": [5, 5, 5], "short": [1, 3, 2], "a whole row": [80, 1],
           "in two groups": [3, 80, 9, 79, 2, 1] * 4}


@pytest.fixture(params=LENGTHS.values(), ids=LENGTHS)
def wanted(request):
    """Some states of each row, the last among them; of every fifth row none."""
    lens = tensor(request.param)[:, None]
    column = torch.arange(80)
    some = (column < lens) & (torch.rand(len(lens), 80) < 0.5) | (column == lens - 1)
    some[4::5] = False
    return some


def test_wanted_states_are_those_of_all(wanted):
    """In the order of rows, whatever groups they are in, and perhaps a few more."""
    policy, tokens = gpt(n_layer=3, block_size=80), torch.randint(11, wanted.shape)
    found, states = policy.hidden(tokens, wanted), policy.hidden(tokens)[wanted]
    assert len(found) % 64 == 0 and len(found) - len(states) < 64
    torch.testing.assert_close(found[: len(states)], states, atol=1e-5, rtol=0)


def test_where_tokens_stand(monkeypatch):
    """The example of `Rows`, where each row's last state is wanted."""
    monkeypatch.setattr(model, "multiple", lambda n, of=8: n)
    rows, last = ragged(tensor([[0, 0, 0, 1], [0, 1, 0, 0]]) > 0)
    assert [group[:2] for group in rows.groups] == [(2, 4)] and rows.kept is None
    assert rows.cells.tolist() == [4, 5, 0, 1, 2, 3]
    assert rows.fill.tolist() == [0, 1, 1, 1, 2, 3, 4, 5]
    assert rows.places.tolist() == [0, 1, 4, 5, 6, 7]
    assert last.kept.tolist() == [5, 1] and last.places.tolist() == [7, 1]  # f, then b: by rows


def test_gradients_of_wanted_states(wanted):
    """Nothing is lost, nothing comes from padding, nothing from the few more."""
    policy, tokens = gpt(n_layer=2, block_size=80), torch.randint(11, wanted.shape)
    target = torch.randn(int(wanted.sum()), policy.config.n_embd)
    found = []
    for states in (policy.hidden(tokens, wanted)[: len(target)], policy.hidden(tokens)[wanted]):
        (states * target).sum().backward()
        found.append(torch.cat([p.grad.flatten() for p in policy.parameters()]))
        policy.zero_grad()
    torch.testing.assert_close(*found, atol=1e-4, rtol=1e-4)


def test_what_is_not_wanted_is_not_computed(wanted, monkeypatch):
    """Products read tokens up to the last wanted one, rounded up to 64; the last MLP the wanted."""
    policy, tokens, seen = gpt(n_layer=2, block_size=80), torch.randint(11, wanted.shape), []
    for block in policy.h:
        block.mlp.register_forward_hook(lambda _, x, y: seen.append(len(y)))
    policy.hidden(tokens, wanted)
    lens = (wanted * torch.arange(1, 81)).amax(1).clamp(min=1)
    assert seen == [-(-int(n) // 64) * 64 for n in (lens.sum(), wanted.sum())]


def test_a_scalar_model_is_zero_where_nothing_is_wanted(wanted):
    reward, tokens = scalar(block_size=80), torch.randint(11, wanted.shape)
    expected = torch.where(wanted, reward(tokens), 0)
    torch.testing.assert_close(reward(tokens, wanted), expected, atol=1e-5, rtol=0)
    assert torch.equal(reward(tokens, wanted) != 0, wanted)


# ---- settings of the processor -------------------------------------------------------------------

@pytest.fixture
def precision():
    yield
    torch.set_float32_matmul_precision("highest")


def test_float32_products_stay_float32(precision):
    """Whatever `tune_cpu` sets, products are as exact as float32 allows."""
    a, b = torch.randn(300, 400), torch.randn(400, 200)
    cli.tune_cpu()
    error = (a @ b - a.double() @ b.double()).norm() / (a.double() @ b.double()).norm()
    assert error < 1e-6


@pytest.mark.parametrize("platform, file", [("darwin", "/none"), ("win32", "/none")])
def test_other_systems_are_left_alone(monkeypatch, precision, platform, file):
    monkeypatch.setattr(cli.sys, "platform", platform)
    monkeypatch.setattr(cli.ctypes, "CDLL", lambda *args: pytest.fail("no such library there"))
    monkeypatch.setattr(cli, "CPUINFO", cli.Path(file))
    cli.tune_cpu()
    assert torch.get_float32_matmul_precision() == "highest"


@pytest.mark.parametrize("processor, chosen", [("AuthenticAMD", "medium"),
                                               ("GenuineIntel", "highest")])
def test_only_amd_gets_another_library(monkeypatch, tmp_path, precision, processor, chosen):
    """An Intel processor with AMX would take "medium" for a leave to multiply in bfloat16."""
    (tmp_path / "cpuinfo").write_text(f"vendor_id : {processor}\n")
    monkeypatch.setattr(cli, "CPUINFO", tmp_path / "cpuinfo")
    cli.tune_cpu()
    assert torch.get_float32_matmul_precision() == chosen


# ---- memory --------------------------------------------------------------------------------------

def test_memory_of_models():
    """Four tensors as large as the weights for what is trained, one for what is frozen."""
    policy, reward = gpt(n_embd=64), scalar(n_embd=64)
    rlhf.lm_pass(policy, [([1, 2, 3, 4], 1)], rlhf.SFT(device="cpu", dtype="float32"))
    gradients = sum(p.grad.nbytes for p in policy.parameters())
    optimizer = rlhf.adam(policy)
    rlhf.update(policy, optimizer, 1e-3)
    averages = sum(x.nbytes for state in optimizer.state.values() for x in state.values()
                   if x.dim())
    sizes = [sum(p.nbytes for p in model.parameters()) for model in (policy, reward)]
    cfg = rlhf.PPO()
    cfg.microbatch_size = 0
    found = cli.memory_needed([policy], [reward], cfg) * 2**30
    assert found == gradients + averages + sizes[0] + sizes[1]


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_memory_of_a_microbatch(dtype, tmp_path):
    """The estimate is within a factor of 1.6 of the bytes that autograd keeps at full length."""
    config = GPTConfig(vocab_size=512, **PRESETS["fable"])
    policy, kept = GPT(config), {}
    cfg = settings(rlhf.SFT, tmp_path, microbatch_size=4, dtype=dtype)
    weights = {p.data_ptr() for p in policy.parameters()}

    def keep(tensor):
        storage = tensor.untyped_storage()
        if tensor.data_ptr() not in weights:
            kept[storage.data_ptr()] = storage.nbytes()
        return tensor

    rows = [(torch.randint(512, (config.block_size,)).tolist(), 1) for _ in range(4)]
    with torch.autocast("cpu", torch.bfloat16, dtype == "bfloat16", cache_enabled=False):
        with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
            rlhf.lm_pass(policy, rows, cfg)
    estimate = cli.memory_needed([policy], [], cfg) * 2**30
    estimate -= 16 * sum(p.numel() for p in policy.parameters())
    assert 1 / 1.6 < estimate / sum(kept.values()) < 1.6, (estimate, sum(kept.values()))


def test_a_run_says_what_it_needs(tmp_path, capsys):
    cfg = settings(rlhf.PPO, tmp_path)
    log(cfg, memory=12.34)
    assert "ppo_ptx: cpu, float32, about 12.3 GiB of memory" in capsys.readouterr().out
