"""Logits and every gradient against Transformers, in float32, for every family and rope kind.

MCB_TEST_DEVICE=cuda runs both sides on a GPU."""

import os

import mcore_bridge as mb
import pytest
import tiny
import torch
import torch.nn.functional as F

LOGITS, GRADIENTS = 2e-5, 1e-4
DEVICE = os.environ.get("MCB_TEST_DEVICE", "cpu")


def hf_logits(model, ids, **arguments):
    """Transformers' logits, on the CPU whatever the device."""
    arguments = {name: value.to(DEVICE) for name, value in arguments.items()}
    return model(ids.to(DEVICE), **arguments).logits.cpu()


@pytest.fixture(scope="module", params=tiny.ALL_FAMILIES)
def pair(request, tmp_path_factory):
    folder = tmp_path_factory.mktemp(request.param)
    hf_model = tiny.save(request.param, folder)
    config = mb.ModelConfig(**mb.hf_to_mcore_config(str(folder)))
    (model,) = mb.get_mcore_model(config, device=DEVICE)
    report = config.bridge.load_weights([model], folder)
    assert report["bytes_read"] == report["bytes_needed"] > 0
    return hf_model.to(DEVICE), model


def as_hf(model, values):
    """{Hugging Face name: tensor} of one value per engine parameter: exported through a second model that holds the values."""
    (other,) = mb.get_mcore_model(model.config, device=DEVICE)
    with torch.no_grad():
        for (name, target), (other_name, value) in zip(other.named_parameters(), values, strict=True):
            assert name == other_name
            target.copy_(value)
    return dict(model.config.bridge.export_weights([other]))


def check_gradients(hf_model, model, folder):
    for name, parameter in model.named_parameters():
        assert parameter.grad is not None, name
    actual = as_hf(model, [(name, p.grad) for name, p in model.named_parameters()])
    expected = {name: torch.zeros_like(p) if p.grad is None else p.grad for name, p in hf_model.named_parameters()}
    buffers = {name for name in actual if name.endswith(("e_score_correction_bias", "mlp.expert_bias"))}
    if model.config.is_moe_model:
        expected = tiny.on_disk(hf_model, expected, folder)
    assert actual.keys() - buffers == expected.keys() - buffers
    expected = {name: gradient for name, gradient in expected.items() if name not in buffers}
    for name, gradient in expected.items():
        assert tiny.relative(actual[name].cpu(), gradient.cpu()) < GRADIENTS, name
    for module in (hf_model, model):
        module.zero_grad(set_to_none=True)


@pytest.fixture(autouse=True)
def forget_earlier_lengths(pair):
    """Transformers' dynamic RoPE remembers the longest sequence it ever saw; ours is a function of the batch."""
    rope = pair[0].model.rotary_emb
    if rope.rope_type == "dynamic":
        rope.max_seq_len_cached = rope.original_max_seq_len
        rope.inv_freq = rope.original_inv_freq


def hf_loss(logits, labels):
    return F.cross_entropy(logits.flatten(0, 1), labels.flatten(), ignore_index=-100, reduction="sum")


def test_batch(pair, tmp_path):
    hf_model, model = pair
    ids, labels = tiny.rows(3, 24)
    expected = hf_logits(hf_model, ids)
    assert tiny.relative(model(ids, None).cpu(), expected) < LOGITS
    positions = torch.arange(24).repeat(3, 1)
    losses = model(ids, positions, labels=labels).cpu()
    assert losses.shape == labels.shape and (losses[labels == -100] == 0).all()
    expected_loss = hf_loss(expected, labels)
    assert abs(losses.sum().item() - expected_loss.item()) < 1e-4 * abs(expected_loss.item())
    expected_loss.backward()
    losses.sum().backward()
    check_gradients(hf_model, model, tmp_path)


@pytest.mark.parametrize("side", ["right", "left"])
def test_padded(pair, side, tmp_path):
    hf_model, model = pair
    ids, labels = tiny.rows(3, 20, seed=1)
    mask = torch.ones_like(ids)
    for row, padding in enumerate([0, 5, 9]):
        if padding:
            mask[row, -padding:] = 0
    if side == "left":
        mask = mask.flip(1)
    labels = labels.masked_fill(mask == 0, -100)
    positions = (mask.cumsum(1) - 1).clamp_min(0)
    expected = hf_logits(hf_model, ids, attention_mask=mask, position_ids=positions)
    actual = model(ids, positions, mask).cpu()
    assert tiny.relative(actual[mask == 1], expected[mask == 1]) < LOGITS
    hf_loss(expected, labels).backward()
    model(ids, positions, mask, labels=labels).sum().backward()
    check_gradients(hf_model, model, tmp_path)


def test_packed(pair, tmp_path):
    """A packed row gives what its documents give alone."""
    hf_model, model = pair
    lengths = [7, 1, 13, 6]
    ids, labels = tiny.rows(1, sum(lengths), seed=2)
    ends = torch.tensor([0, *lengths]).cumsum(0)
    documents = [slice(start, end) for start, end in zip(ends[:-1].tolist(), ends[1:].tolist())]
    expected = torch.cat([hf_logits(hf_model, ids[:, part]) for part in documents], 1)
    packed = mb.PackedSeqParams(cu_seqlens=ends.int())
    actual = model(ids, None, packed_seq_params=packed).cpu()
    tolerance = LOGITS
    if "dynamic" in str(model.config.rope_scaling):
        # Dynamic NTK looks at the longest sequence of a batch; alone, each document is shorter.
        longest = hf_logits(hf_model, ids[:, documents[2]])
        assert tiny.relative(actual[:, documents[2]], longest) < tolerance
        return
    assert tiny.relative(actual, expected) < tolerance
    explicit = torch.cat([torch.arange(length) for length in lengths])[None]
    assert torch.equal(actual, model(ids, explicit, packed_seq_params=packed).cpu())
    hf_loss(expected, labels).backward()
    model(ids, None, labels=labels, packed_seq_params=packed).sum().backward()
    check_gradients(hf_model, model, tmp_path)


def test_round_trip(pair, tmp_path):
    """Loading and saving gives the same tensors, bit for bit, and Transformers opens the files."""
    from transformers import AutoModelForCausalLM

    hf_model, model = pair
    model.config.bridge.save_weights([model], tmp_path / "out", max_shard_size="50KB")
    hf_model.config.save_pretrained(tmp_path / "out")
    again = AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    expected = hf_model.state_dict()
    assert again.state_dict().keys() == expected.keys()
    for name, tensor in again.state_dict().items():
        assert torch.equal(tensor, expected[name].cpu()), name


def test_bfloat16(pair, tmp_path):
    hf_model, whole = pair
    hf_model.save_pretrained(tmp_path)
    config = mb.ModelConfig(**mb.hf_to_mcore_config(str(tmp_path)), params_dtype=torch.bfloat16)
    (model,) = mb.get_mcore_model(config, device=DEVICE)
    config.bridge.load_weights([model], tmp_path)
    ids, _ = tiny.rows(2, 24, seed=3)
    with torch.no_grad():
        expected = hf_logits(hf_model, ids)
        # Rounding moves a token between experts whose scores are close: both sides choose alike here.
        with mb.record_routing(whole) as choices:
            whole(ids, None)
        with mb.replay_routing(model, choices):
            assert tiny.relative(model(ids, None).float().cpu(), expected) < 2e-2
