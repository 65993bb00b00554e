"""Megatron-LM's `torch_dist` checkpoints: Hugging Face folders to and from them."""

from .convert import from_megatron, load_megatron, to_megatron
from .layout import locate, saved_args, side_folder

__all__ = ["from_megatron", "load_megatron", "locate", "saved_args", "side_folder", "to_megatron"]
