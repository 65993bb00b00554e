"""MCore-Bridge: train any Hugging Face model, split over tensor, pipeline and data parallel ranks.

Names load on first use, so that `import mcore_bridge` costs little more than `import torch`.
"""

from importlib import import_module as _import_module

__version__ = "0.1.0"
__release_datetime__ = "2026-11-24 00:00:00"

_EXPORTS = {
    "config": ["ModelConfig", "hf_to_mcore_config", "config_fields"],
    "model": ["get_mcore_model", "GPTModel", "PackedSeqParams", "unwrap_model", "forward_logits"],
    "bridge": ["GPTBridge", "inspect_checkpoint", "convert_checkpoint", "diff_checkpoints"],
    "lora": ["LoraOptions", "LoraParallelLinear", "add_lora"],
    "trainer": ["Trainer", "finish_gradients", "materialised", "update_fp8_scales"],
    "routing": ["record_routing", "replay_routing"],
    "planner": ["plan_layout", "search_layouts", "check_layout"],
    "parallel_state": [
        "initialize_model_parallel",
        "destroy_model_parallel",
        "get_parallel_state",
        "communication_volume",
        "reset_communication_volume",
        "model_parallel_is_initialized",
        "split_cp_inputs",
    ],
    "utils": ["get_logger", "set_random_seed"],
}
_MODULE_OF = {name: module for module, names in _EXPORTS.items() for name in names}

__all__ = [*_MODULE_OF, "__version__", "cmake_prefix_path"]


def __getattr__(name):
    if name == "cmake_prefix_path":
        from pathlib import Path

        return str(Path(__file__).parent / "share" / "cmake")
    if name not in _MODULE_OF:
        raise AttributeError(f"module 'mcore_bridge' has no attribute '{name}'")
    value = getattr(_import_module(f".{_MODULE_OF[name]}", __name__), name)
    globals()[name] = value
    return value


def __dir__():
    return sorted(__all__)
