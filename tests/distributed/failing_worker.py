"""One scenario that must fail on every rank together: `failing_worker.py SCENARIO FOLDER WORK`. Each rank prints the error's type
and text and exits with 3; anything else is a bug the test sees."""

import os
import resource
import signal
import sys
import threading
from pathlib import Path

import torch
import torch.distributed as dist

sys.path.insert(0, str(Path(__file__).parents[1] / "python"))
import mcore_bridge as mb  # noqa: E402
import tiny  # noqa: E402


def build(folder, **layout):
    mb.initialize_model_parallel(**layout)
    config = mb.ModelConfig(**mb.hf_to_mcore_config(folder), **layout)
    return config, mb.get_mcore_model(config)


def load(folder, work):
    config, models = build(folder, pipeline_model_parallel_size=2)
    config.bridge.load_weights(models, folder)


def layout(folder, work):
    build(folder, tensor_model_parallel_size=2, pipeline_model_parallel_size=2)


def heads(folder, work):
    mb.initialize_model_parallel(tensor_model_parallel_size=2)
    mb.ModelConfig(
        **{**mb.hf_to_mcore_config(folder), "num_attention_heads": 9, "num_query_groups": 9}, tensor_model_parallel_size=2
    )


def nan_on_one_rank(folder, work):
    config, models = build(folder)
    config.bridge.load_weights(models, folder)
    trainer = mb.Trainer(models, lr=1e-3, train_iters=3)
    ids, labels = tiny.rows(2, 8)
    trainer.train_step([dict(input_ids=ids, labels=labels)])
    if dist.get_rank() == 1:
        with torch.no_grad():
            next(iter(models[0].parameters()))[ids[0, 0]] = float("inf")
    trainer.train_step([dict(input_ids=ids, labels=labels)])


def no_labels_on_one_rank(folder, work):
    config, models = build(folder)
    config.bridge.load_weights(models, folder)
    trainer = mb.Trainer(models, lr=1e-3, train_iters=3)
    ids, labels = tiny.rows(2, 8)
    batch = dict(input_ids=ids, labels=labels)
    trainer.train_step([batch] if dist.get_rank() == 0 else [batch, batch])


def full_disk(folder, work):
    """Files may not grow beyond 20 kB on rank 1: its writes fail as on a full disk."""
    config, models = build(folder, tensor_model_parallel_size=2)
    config.bridge.load_weights(models, folder)
    config.bridge.save_weights(models, work / "out")
    if dist.get_rank() == 1:
        signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
        resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, 20_000))
    with torch.no_grad():
        for parameter in models[0].parameters():
            parameter.zero_()
    config.bridge.save_weights(models, work / "out")


def not_a_folder(folder, work):
    config, models = build(folder, tensor_model_parallel_size=2)
    config.bridge.load_weights(models, folder)
    (work / "file").write_text("")
    config.bridge.save_weights(models, work / "file" / "out")


def lost_stage(folder, **fields):
    """Stage 2 of 4 is killed while the others train on."""
    mb.initialize_model_parallel(pipeline_model_parallel_size=4)
    config = mb.ModelConfig(**mb.hf_to_mcore_config(folder), pipeline_model_parallel_size=4, **fields)
    models = mb.get_mcore_model(config)
    config.bridge.load_weights(models, folder)
    trainer = mb.Trainer(models, lr=1e-3, train_iters=1_000_000)
    ids, labels = tiny.rows(4, 64)
    batches = [dict(input_ids=ids, labels=labels)] * 8
    trainer.train_step(batches)
    if dist.get_rank() == 2:
        threading.Timer(0.5, lambda: os.kill(os.getpid(), signal.SIGKILL)).start()
    while True:
        trainer.train_step(batches)


def lost_stage_vpp(folder, work):
    lost_stage(folder, virtual_pipeline_model_parallel_size=2)


def lost_stage_zb(folder, work):
    lost_stage(folder, pipeline_schedule="zb-h1")


def main():
    scenario, folder, work = sys.argv[1:]
    torch.set_num_threads(1)
    dist.init_process_group("gloo")
    try:
        globals()[scenario](folder, Path(work))
    except Exception as error:
        text = error.args[0] if error.args else ""
        print(f"\nRANK {dist.get_rank()} {type(error).__name__}: {text}".replace("\n", " ") + "\n", flush=True)
        if scenario.startswith("lost_stage"):
            os._exit(3)  # not every rank is there for a barrier
        dist.barrier()
        sys.exit(3)
    print(f"\nRANK {dist.get_rank()} went on\n", flush=True)


if __name__ == "__main__":
    main()
