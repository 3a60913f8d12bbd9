"""PEFT's adapters over our network, to measure against: a LoRA of rank 1 per level on every undilated convolution."""

from collections.abc import Sequence

import torch
from peft import LoraConfig, get_peft_model
from torch import nn


def lora_network(network: nn.Module, levels: Sequence[str]) -> nn.Module:
    """The network with an adapter per level. LoRA adapts weights of convolutions only, not BatchNorm."""
    # PEFT leaves a convolution's dilation out of its adapter: the shapes then differ
    names = [name for name, m in network.named_modules() if isinstance(m, nn.Conv2d) and m.dilation == (1, 1)]
    config = LoraConfig(r=1, target_modules=names, lora_alpha=1)
    lora = get_peft_model(network, config, adapter_name=levels[0])
    for level in levels[1:]:
        lora.add_adapter(level, config)
    for name, parameter in lora.named_parameters():
        if "lora_B" in name:
            nn.init.normal_(parameter, std=0.01)
    lora.requires_grad_(False)
    lora.eval()
    assert isinstance(lora, nn.Module)
    torch.manual_seed(0)
    return lora
