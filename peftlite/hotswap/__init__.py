"""Other weights for a loaded LoRA adapter, in the tensors that it has: no new modules, and no new compiled code.

    prepare_model_for_compiled_hotswap(model, target_rank=64)     once, before torch.compile
    hotswap_adapter(model, "other-adapter", "default")            as often as wanted

All is read, checked and padded first; then the numbers are copied over at once.
"""

from peftlite.hotswap.compatible import check_hotswap_configs_compatible
from peftlite.hotswap.prepare import prepare_model_for_compiled_hotswap
from peftlite.hotswap.swap import hotswap_adapter, hotswap_adapter_from_state_dict

__all__ = [
    "check_hotswap_configs_compatible",
    "hotswap_adapter",
    "hotswap_adapter_from_state_dict",
    "prepare_model_for_compiled_hotswap",
]
