"""The process groups of this rank: made by torch.distributed, used by the engine."""

from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist

from .engine import _core

_STATE = None


@dataclass
class ParallelState:
    """Ranks and sizes of this process in every parallel dimension."""

    engine: Any
    rank: int
    world_size: int
    tp_size: int
    pp_size: int
    cp_size: int
    dp_size: int
    vp_size: int
    groups: dict

    @property
    def tp_rank(self):
        return self.engine.place.tp

    @property
    def pp_rank(self):
        return self.engine.place.pp

    @property
    def cp_rank(self):
        return self.engine.place.cp

    @property
    def dp_rank(self):
        return self.engine.place.dp

    @property
    def is_pipeline_first_stage(self):
        return self.pp_rank == 0

    @property
    def is_pipeline_last_stage(self):
        return self.pp_rank == self.pp_size - 1


def initialize_model_parallel(
    tensor_model_parallel_size=1,
    pipeline_model_parallel_size=1,
    virtual_pipeline_model_parallel_size=None,
    *,
    context_parallel_size=1,
    expert_model_parallel_size=1,
    expert_tensor_parallel_size=None,
    order="tp-cp-ep-dp-pp",
    distributed_timeout_minutes=30,
):
    """Makes the groups, with Megatron's argument names. Call it on every rank, after torch.distributed.init_process_group
    when there is more than one process. Raises ValueError when the sizes do not divide the number of processes."""
    global _STATE
    if _STATE is not None:
        raise ValueError("initialize_model_parallel was called already; call destroy_model_parallel first")
    if order != "tp-cp-ep-dp-pp":
        raise ValueError(f"order: '{order}' is not supported; ranks are laid out as tp-cp-ep-dp-pp")
    initialized = dist.is_available() and dist.is_initialized()
    world_size = dist.get_world_size() if initialized else 1
    rank = dist.get_rank() if initialized else 0
    topology = _core.Topology(
        world_size,
        tensor=tensor_model_parallel_size,
        pipeline=pipeline_model_parallel_size,
        virtual_pipeline=virtual_pipeline_model_parallel_size or 1,
        context=context_parallel_size,
        expert=expert_model_parallel_size,
        expert_tensor=expert_tensor_parallel_size or tensor_model_parallel_size,
    )
    mine, made = {}, {}
    if world_size > 1:
        from datetime import timedelta

        timeout = timedelta(minutes=distributed_timeout_minutes)
        # Both back ends: errors and counts travel as host tensors, so that no step waits for the device.
        backend = "cpu:gloo,cuda:nccl" if torch.cuda.is_available() and dist.is_nccl_available() else "gloo"
        for name in _core.group_names():
            for ranks in topology.groups(name):
                # Groups of the same ranks are one, but for the pipeline's two directions, which must not wait for each other.
                key = (*ranks, "back") if name == "pp-back" else tuple(ranks)
                if len(ranks) == 1:
                    continue
                if key not in made:  # every rank makes every group, in the same order
                    made[key] = dist.new_group(ranks, timeout=timeout, backend=backend)
                if rank in ranks:
                    mine[name] = (made[key], ranks)
    _STATE = ParallelState(
        engine=_core.ParallelState.create(topology, rank, mine),
        rank=rank,
        world_size=world_size,
        tp_size=tensor_model_parallel_size,
        pp_size=pipeline_model_parallel_size,
        cp_size=context_parallel_size,
        dp_size=topology.data,
        vp_size=virtual_pipeline_model_parallel_size or 1,
        groups=mine,
    )
    return _STATE


def destroy_model_parallel():
    """Forgets the groups; torch.distributed itself stays initialized."""
    global _STATE
    _STATE = None


def model_parallel_is_initialized():
    return _STATE is not None


def get_parallel_state():
    """The state made by initialize_model_parallel; on one process it is made on demand."""
    if _STATE is None:
        if dist.is_available() and dist.is_initialized() and dist.get_world_size() > 1:
            raise ValueError("call mcore_bridge.initialize_model_parallel(...) on every rank first")
        return initialize_model_parallel()
    return _STATE


def communication_volume():
    """What this process has sent and received since the start or the last reset_communication_volume():
    {group kind: {operation: {"calls", "bytes", "wire_bytes", "ranks"}}}. `bytes` is the whole tensor an operation is about (an
    all_gather's result, a reduce_scatter's input), `wire_bytes` what one rank sends at least:
    include/mcore_bridge/communication.h has the table."""
    return _core.communication_volume()


def reset_communication_volume():
    """Starts counting anew."""
    _core.reset_communication_volume()


def split_cp_inputs(inputs, cu_seqlens, dim):
    """This context-parallel rank's part of `inputs`, as `model(...)` takes it: each sequence (the whole tensor when cu_seqlens is None) is cut into
    2 * cp equal chunks along `dim`; rank r keeps chunks r and 2 * cp - 1 - r, in that order."""
    state = get_parallel_state()
    size, rank = state.cp_size, state.cp_rank
    if size == 1:
        return inputs
    dim = dim % inputs.dim()
    ends = [0, inputs.size(dim)] if cu_seqlens is None else [int(end) for end in cu_seqlens]
    parts = []
    for start, end in zip(ends, ends[1:]):
        if (end - start) % (2 * size):
            raise ValueError(f"split_cp_inputs: a sequence of {end - start} does not divide into {2 * size} chunks; pad it")
        chunk = (end - start) // (2 * size)
        for index in (rank, 2 * size - 1 - rank):
            parts.append(inputs.narrow(dim, start + index * chunk, chunk))
    return torch.cat(parts, dim)
