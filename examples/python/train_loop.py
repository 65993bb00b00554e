"""The drop-in API in a plain PyTorch loop: any optimizer, `loss.backward()`.

torchrun --nproc_per_node 2 examples/python/train_loop.py FOLDER OUT
"""

import os
import sys

import mcore_bridge as mb
import torch
import torch.distributed as dist
from transformers import AutoConfig, AutoTokenizer

TEXTS = ["The bridge joins two sides of the river.", "A model is trained on what it is shown."]


def main():
    path, out = sys.argv[1:]
    size = int(os.environ.get("WORLD_SIZE", 1))
    if size > 1:
        dist.init_process_group("gloo")
    mb.initialize_model_parallel(tensor_model_parallel_size=size)
    mb.set_random_seed(42)
    config = mb.ModelConfig(
        params_dtype=torch.float32,
        tensor_model_parallel_size=size,
        sequence_parallel=size > 1,
        **mb.hf_to_mcore_config(AutoConfig.from_pretrained(path)),
    )
    models = mb.get_mcore_model(config)
    config.bridge.load_weights(models, path)

    tokenizer = AutoTokenizer.from_pretrained(path)
    batch = tokenizer(TEXTS, return_tensors="pt", padding="max_length", max_length=16, truncation=True)
    labels = batch["input_ids"].roll(-1, 1).masked_fill(batch["attention_mask"].roll(-1, 1) == 0, -100)
    labels[:, -1] = -100
    optimizer = torch.optim.AdamW(models[0].parameters(), lr=1e-4)
    for step in range(3):
        # Under sequence parallelism norms see a part of the sequence each; Trainer adds their gradients up by itself.
        losses = models[0](batch["input_ids"], labels=labels)
        loss = losses.sum() / (labels != -100).sum()
        optimizer.zero_grad()
        loss.backward()
        mb.finish_gradients(models)
        optimizer.step()
        if mb.get_parallel_state().rank == 0:
            print(f"step {step + 1}: loss {loss.item():.4f}")
    config.bridge.save_weights(models, out)
    if size > 1:
        dist.destroy_process_group()


if __name__ == "__main__":
    main()
