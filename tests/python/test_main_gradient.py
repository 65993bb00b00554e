"""Training accumulates gradients of a bf16 model in fp32 inside the layers' backward; loops of one's own get them from autograd."""

import os

import mcore_bridge as mb
import pytest
import tiny
import torch

DEVICE = os.environ.get("MCB_TEST_DEVICE", "cpu")


@pytest.mark.parametrize("name", ["llama3_biases_tied", "qwen3"])
@pytest.mark.parametrize("lora", [False, True], ids=["full", "lora"])
def test_trainer_sees_autograds_gradients(name, lora, tmp_path):
    tiny.save(name, tmp_path)
    config = mb.ModelConfig(**mb.hf_to_mcore_config(str(tmp_path)), params_dtype="bfloat16")
    models = mb.get_mcore_model(config, device=DEVICE)
    config.bridge.load_weights(models, tmp_path)
    if lora:
        mb.add_lora(models, mb.LoraOptions(r=4, lora_alpha=8, target_modules=["q_proj", "v_proj", "o_proj", "up_proj"]))
        with torch.no_grad():
            for key, parameter in models[0].named_parameters():
                if ".lora_B." in key:
                    parameter.normal_(0, 0.1)
    batches = [tiny.rows(2, 16, seed=seed) for seed in (1, 2)]
    tokens = sum(int((labels >= 0).sum()) for _, labels in batches)
    total, loss = {}, 0.0
    for ids, labels in batches:
        models[0].zero_grad()
        mean = models[0](ids.to(DEVICE), labels=labels.to(DEVICE)).sum() / tokens
        mean.backward()
        loss += mean.item()
        for key, parameter in models[0].named_parameters():
            if parameter.grad is not None:
                total[key] = total.get(key, 0) + parameter.grad.float()
    models[0].zero_grad()
    norm = torch.stack([gradient.norm() for gradient in total.values()]).norm().item()

    trainer = mb.Trainer(models, lr=0.0, lr_decay_style="constant", train_iters=4, clip_grad=0.0, weight_decay=0.0)
    micro = [dict(input_ids=ids, labels=labels) for ids, labels in batches]
    results = [trainer.train_step(micro) for _ in range(2)]
    for result in results:  # nothing of the first step is left in the second
        assert abs(result.grad_norm / norm - 1) < 1e-2
        assert abs(result.loss / loss - 1) < 1e-3
    assert results[0].grad_norm == results[1].grad_norm
    one = trainer.train_step(micro[:1])
    assert one.grad_norm != results[0].grad_norm
