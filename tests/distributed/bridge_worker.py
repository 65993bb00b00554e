"""Weights in and out on several ranks: `bridge_worker.py FOLDER WORK`, one launch for all cases. Rank 0 writes WORK/results.pt."""

import sys
from pathlib import Path

import torch
import torch.distributed as dist

sys.path.insert(0, str(Path(__file__).parents[1] / "python"))
import mcore_bridge as mb  # noqa: E402
import tiny  # noqa: E402


def load_converter(name, value):
    """Undoes what test_bridge.py did to the files: a prefix, a transposed matrix, tensors nobody needs."""
    if name.startswith("junk."):
        return None
    name = name.removeprefix("old.")
    if name.endswith("layers.0.self_attn.q_proj.weight"):
        return name, value.load().t()
    return name, value


def save_converter(name, tensor):
    if name == "model.norm.weight":
        return None
    if name.endswith("layers.1.mlp.up_proj.weight"):
        return "new." + name, tensor.t().double().contiguous()
    return "new." + name, tensor


def main():
    folder, work = map(Path, sys.argv[1:])
    torch.set_num_threads(1)
    dist.init_process_group("gloo")
    layout = dict(tensor_model_parallel_size=2, pipeline_model_parallel_size=2)
    mb.initialize_model_parallel(**layout)
    config = mb.ModelConfig(**mb.hf_to_mcore_config(folder), **layout)
    models = mb.get_mcore_model(config)
    bridge = config.bridge
    results = {}

    report = bridge.load_weights(models, folder, disable_tqdm=False)
    results["bytes"] = [None] * dist.get_world_size()
    dist.all_gather_object(results["bytes"], (report["bytes_read"], report["bytes_needed"]))

    def exported(**options):
        return {name: tensor.clone() for name, tensor in bridge.export_weights(models, **options)}

    results["export"] = exported()
    for size in (1, 5000):
        again = exported(bucket_size=size)
        assert again.keys() == results["export"].keys()
        assert all(torch.equal(tensor, again[name]) for name, tensor in results["export"].items())
    master = exported(only_master_rank=True, target_device="cpu", bucket_size=20_000, converter=lambda n, t: (n, t))
    assert (len(master) > 0) == (dist.get_rank() == 0)
    results["export_master"] = master
    results["logits"] = mb.forward_logits(models, tiny.rows(2, 16, seed=1)[0])

    bridge.save_weights(models, work / "converted_out", converter=save_converter, max_shard_size="50KB", disable_tqdm=False)
    bridge.save_weights(models, work / "plain_out", max_shard_size=50_000)

    for parameter in models[0].parameters():
        parameter.data.zero_()
    report = bridge.load_weights(models, work / "converted_in", converter=load_converter)
    assert report["bytes_read"] == report["bytes_needed"] and not report["unexpected"]
    results["converted_load"] = exported()

    if dist.get_rank() == 0:
        torch.save(results, work / "results.pt")
    dist.barrier()
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
