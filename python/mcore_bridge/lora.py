"""LoRA adapters inside the engine's linear layers."""

from dataclasses import dataclass, field
from typing import List, Optional

from .engine import _core
from .model import EngineModule, engines, unwrap_model


class LoraParallelLinear(EngineModule):
    """A parallel linear layer that carries adapters: base_layer, lora_A.<adapter>, lora_B.<adapter>.

    A fused layer (QKV, gate/up) keeps one A per Hugging Face projection, stacked, as PEFT trains them: lora_A is
    [projections * r, in], lora_B [out, r].
    """

    kind = "LoraParallelLinear"


@dataclass
class LoraOptions:
    """PEFT's LoraConfig in short. target_modules: "all-linear", Megatron names (linear_qkv, ...) or Hugging Face names
    (q_proj, ...), or dotted suffixes; target_regex instead: must match a whole module name of either kind."""

    r: int = 8
    lora_alpha: float = 32
    lora_dropout: float = 0.0
    use_rslora: bool = False
    target_modules: List[str] = field(default_factory=lambda: ["all-linear"])
    target_regex: Optional[str] = None
    modules_to_save: List[str] = field(default_factory=list)
    seed: int = 42

    def engine(self):
        options = _core.LoraOptions()
        options.r = self.r
        options.lora_alpha = float(self.lora_alpha)
        options.lora_dropout = float(self.lora_dropout)
        options.use_rslora = bool(self.use_rslora)
        options.target_modules = (
            [self.target_modules] if isinstance(self.target_modules, str) else list(self.target_modules or [])
        )
        options.target_regex = self.target_regex or ""
        options.modules_to_save = list(self.modules_to_save or [])
        options.seed = self.seed
        return options


def add_lora(models, options: LoraOptions, adapter_name="default"):
    """Adds an adapter to every matching linear layer and freezes everything else but modules_to_save. B starts at zero, A
    as PEFT's default; both are independent of the parallel layout. Load base weights before."""
    _core.add_lora(engines(models), options.engine(), adapter_name)
    for model in models if isinstance(models, (list, tuple)) else [models]:
        unwrap_model(model).mirror()
    return models
