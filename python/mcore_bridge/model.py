"""Models as torch.nn.Modules. The module tree mirrors the engine's: same names, and the parameters are the very tensors
the C++ code computes with, so optimizers, hooks on gradients and `loss.backward()` see them. Only the root's forward runs."""

from dataclasses import dataclass
from typing import Optional

import torch
from torch import nn

from .config import ModelConfig
from .engine import _core
from .parallel_state import get_parallel_state


@dataclass
class PackedSeqParams:
    """Documents of a packed row: tokens [cu_seqlens[i], cu_seqlens[i + 1]) are document i. int32 [documents + 1]."""

    cu_seqlens: torch.Tensor


class EngineModule(nn.Module):
    """A part of the engine's module tree. Its computation happens inside the root model."""

    kind = ""

    def forward(self, *args, **kwargs):
        raise RuntimeError(f"{type(self).__name__} runs inside the engine; call the model it belongs to")

    def extra_repr(self):
        return ", ".join(f"{name}: {tuple(p.shape)}" for name, p in self._parameters.items())


_CLASSES = {}


def module_class(kind):
    """The Python class that stands for the engine's modules of this kind."""
    if kind not in _CLASSES:
        from .lora import LoraParallelLinear

        known = {"LoraParallelLinear": LoraParallelLinear}
        _CLASSES[kind] = known.get(kind) or type(kind or "Container", (EngineModule,), {"kind": kind})
    return _CLASSES[kind]


def _as_parameter(tensor):
    # nn.Parameter(tensor) would make a second tensor object with its own .grad; the mark makes this one count as a parameter.
    tensor._is_param = True
    return tensor


class GPTModel(nn.Module):
    """The chunk of a language model that this rank holds."""

    def __init__(self, config: ModelConfig, vp_stage: int = 0, device=None):
        super().__init__()
        self.config = config
        self.vp_stage = vp_stage
        if device is None:
            device = f"cuda:{torch.cuda.current_device()}" if torch.cuda.is_available() else "cpu"
        self.engine = _core.GPTModel(config.engine, get_parallel_state().engine, vp_stage, str(device))
        self.device = torch.device(str(device))
        self._input_tensor = None
        # What callers of Megatron models and PEFT look for.
        self.model_type = "encoder_or_decoder"
        self.prepare_inputs_for_generation = None
        self.mirror()

    @property
    def pre_process(self):
        return self.engine.pre_process

    @property
    def post_process(self):
        return self.engine.post_process

    @property
    def share_embeddings_and_output_weights(self):
        return not self.config.untie_embeddings_and_output_weights

    def mirror(self):
        """Builds the tree of modules and parameters anew from the engine's (after adapters were added)."""
        self._modules.clear()
        kinds = dict(self.engine.named_modules())
        self._container("", kinds)
        for name in kinds:
            self._container(name, kinds)
        for name, tensor in self.engine.named_parameters():
            module_name, _, leaf = name.rpartition(".")
            self._container(module_name, kinds).register_parameter(leaf, _as_parameter(tensor))
        for name, tensor in self.engine.named_buffers():
            module_name, _, leaf = name.rpartition(".")
            self._container(module_name, kinds).register_buffer(leaf, tensor)

    def _container(self, name, kinds):
        module, path = self, ""
        for part in filter(None, name.split(".")):
            path = f"{path}.{part}".lstrip(".")
            if part not in module._modules:
                module.add_module(part, module_class(kinds.get(path, ""))())
            module = module._modules[part]
        return module

    def train(self, mode: bool = True):
        super().train(mode)
        self.engine.train(mode)
        return self

    def _apply(self, fn, recurse=True):
        for parameter in self.parameters():
            probe = fn(torch.empty(0, dtype=parameter.dtype, device=parameter.device))
            if probe.dtype != parameter.dtype or probe.device != parameter.device:
                raise ValueError(
                    f"the model is {parameter.dtype} on {parameter.device} and cannot be moved to {probe.dtype} on {probe.device}; "
                    "build it there: ModelConfig(params_dtype=...), get_mcore_model(config, device=...)"
                )
            break

        # .bfloat16() on a model of that dtype changes nothing: FP8 codes, their scales and routers in float32 stay what they are.
        def same_dtype(tensor):
            result = fn(tensor)
            return result if result.dtype == tensor.dtype else tensor

        return super()._apply(same_dtype, recurse)

    def set_input_tensor(self, input_tensor):
        """Hidden states from the previous pipeline stage for the next forward (a tensor or a list of one)."""
        if isinstance(input_tensor, (list, tuple)):
            (input_tensor,) = input_tensor
        self._input_tensor = input_tensor

    def forward(
        self,
        input_ids,
        position_ids=None,
        attention_mask=None,
        decoder_input=None,
        labels=None,
        packed_seq_params=None,
        runtime_gather_output=None,
        *,
        loss_mask=None,
    ):
        """Per-token loss [b, s] when labels are given (labels[t] is the target of position t, -100 none); else logits
        [b, s, vocab / tp] (whole [b, s, vocab] with runtime_gather_output); hidden states [s, b, h] before the last stage.

        attention_mask: [b, s] with 1 for tokens, or bool [b, 1, s, s] with True for what is masked; None: causal.
        loss_mask: [b, s]; its zeros give zero loss.
        """
        if loss_mask is not None and labels is not None:
            labels = labels.masked_fill(loss_mask == 0, -100)
        hidden = decoder_input if decoder_input is not None else self._input_tensor
        self._input_tensor = None
        return self.engine.forward(
            dict(
                input_ids=input_ids,
                position_ids=position_ids,
                attention_mask=attention_mask,
                labels=labels,
                hidden=hidden,
                packed_seq_params=packed_seq_params,
            ),
            bool(runtime_gather_output),
        )


def get_mcore_model(config: ModelConfig, device: Optional[str] = None):
    """This rank's chunks of the model: a list, one per virtual pipeline stage. Weights are undefined until they are loaded,
    unless config.perform_initialization asks for random ones. device: default the current GPU, else the CPU."""
    models = [GPTModel(config, vp_stage, device) for vp_stage in range(config.virtual_pipeline_model_parallel_size or 1)]
    if config.perform_initialization:
        config.bridge.initialize(models, seed=torch.initial_seed() % 2**63)
    return models


def get_mcore_model_type(hf_model_type):
    """The family that a Hugging Face model_type belongs to; None when this version has none."""
    return next((name for name, types, _ in _core.families() if hf_model_type in types), None)


def unwrap_model(models, module_instances=None):
    """Strips wrappers that hold the model as `.module` (DDP, FSDP, Float16Module): a list gives a list, one gives one."""
    single = not isinstance(models, list)
    result = []
    for model in [models] if single else models:
        while (isinstance(model, module_instances) if module_instances else not isinstance(model, GPTModel)) and hasattr(
            model, "module"
        ):
            model = model.module
        result.append(model)
    return result[0] if single else result


def engines(models):
    """The C++ chunks of models, wrapped or not."""
    models = models if isinstance(models, (list, tuple)) else [models]
    return [unwrap_model(model).engine for model in models]


def forward_logits(models, input_ids, position_ids=None, attention_mask=None, packed_seq_params=None, labels=None):
    """Whole logits [b, s, vocab] (or per-token losses with labels) on every rank, through all pipeline stages. Collective,
    without gradients."""
    return _core.forward_all_stages(
        engines(models),
        dict(
            input_ids=input_ids,
            position_ids=position_ids,
            attention_mask=attention_mask,
            labels=labels,
            packed_seq_params=packed_seq_params,
        ),
    )
