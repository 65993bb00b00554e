"""How long a training checkpoint takes, and how long training waits for it in the background mode.

python benchmarks/save_checkpoint.py [--hidden 1024] [--layers 8] [--folder /tmp/checkpoint]
torchrun --nproc_per_node 2 benchmarks/save_checkpoint.py --tensor_model_parallel_size 2
"""

import argparse
import json
import os
import shutil
import tempfile
import threading
import time
from pathlib import Path

import mcore_bridge as mb
import torch
from mcore_bridge.cli.launch import finish_distributed, init_distributed
from mcore_bridge.engine import _core
from mcore_bridge.training.control import new_engine_group


def main():
    parser = argparse.ArgumentParser()
    parser.add_argument("--hidden", type=int, default=1024)
    parser.add_argument("--layers", type=int, default=8)
    parser.add_argument("--tensor_model_parallel_size", type=int, default=1)
    parser.add_argument("--folder", default=os.path.join(tempfile.gettempdir(), "save-checkpoint-benchmark"))
    a = parser.parse_args()
    init_distributed()
    mb.initialize_model_parallel(tensor_model_parallel_size=a.tensor_model_parallel_size)
    fields = dict(
        model_type="llama", hidden_size=a.hidden, intermediate_size=4 * a.hidden, num_hidden_layers=a.layers, num_attention_heads=a.hidden // 64,
        num_key_value_heads=a.hidden // 64, vocab_size=32000, tie_word_embeddings=True,
    )  # fmt: skip
    source = Path(a.folder) / "config"
    if mb.get_parallel_state().rank == 0:
        source.mkdir(parents=True, exist_ok=True)
        (source / "config.json").write_text(json.dumps(fields))
    group = new_engine_group()
    if group:
        torch.distributed.barrier()
    config = mb.ModelConfig(
        **mb.hf_to_mcore_config(str(source)), params_dtype="bfloat16", tensor_model_parallel_size=a.tensor_model_parallel_size
    )
    models = mb.get_mcore_model(config)
    config.bridge.initialize(models, seed=1)
    trainer = mb.Trainer(models, lr=1e-4, train_iters=10)
    ids = torch.randint(0, 32000, (1, 16))
    trainer.train_step([dict(input_ids=ids, labels=ids)])
    writer = _core.CheckpointWriter(
        trainer._engine, peft_format=False, adapter_name="default", max_shard_bytes=5 * 10**9, optimizer=True
    )
    leader = mb.get_parallel_state().rank == 0
    for turn in range(3):
        begin = time.monotonic()
        size, _ = writer.write(f"{a.folder}/sync", [], "{}", group)
        whole = time.monotonic() - begin
        begin = time.monotonic()
        writer.snapshot()
        blocked = time.monotonic() - begin
        thread = threading.Thread(target=writer.write, args=(f"{a.folder}/async", [], "{}", group))
        thread.start()
        thread.join()
        total = time.monotonic() - begin
        if leader:
            print(
                f"turn {turn}: {size / 1e6:,.0f} MB; foreground {whole:.2f} s ({size / whole / 1e9:.2f} GB/s); background {total:.2f} s, "
                f"of which training waits {blocked:.3f} s ({size / blocked / 1e9:.2f} GB/s)",
                flush=True,
            )
    state = json.loads((Path(a.folder) / "async/training_state/state.json").read_text())
    begin = time.monotonic()
    files = [(name, entry["bytes"], entry["crc32c"]) for name, entry in state["files"].items()]
    assert _core.damaged_files(f"{a.folder}/async", files, group) == []
    checked = time.monotonic() - begin
    begin = time.monotonic()
    _core.load_optimizer_state(trainer._engine, f"{a.folder}/async", peft_format=False, adapter_name="default")
    if leader:
        print(f"checksums of all files {checked:.2f} s; loading the optimizer {time.monotonic() - begin:.2f} s", flush=True)
    finish_distributed()
    if leader:
        shutil.rmtree(a.folder)


if __name__ == "__main__":
    main()
