"""The tiny Llama of the tests that need one model and not every family."""

from __future__ import annotations

from typing import Any

import torch
from transformers import LlamaConfig, LlamaForCausalLM

from builders import stir


def tiny_llama(dtype: torch.dtype = torch.bfloat16, *, stirred: bool = False, **config: Any) -> LlamaForCausalLM:
    """A Llama of two layers, always with the same weights.

    Args:
        dtype: of its parameters.
        stirred: whether norms and biases are drawn as well, so that none is one or nothing.
        config: more of its config.
    """
    torch.manual_seed(0)
    shape = {"num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 2}
    model = LlamaForCausalLM(LlamaConfig(**{**shape, **config}))
    if stirred:
        stir(model)
    for parameter in model.parameters():  # not the rotary frequencies, which stay in float32
        parameter.data = parameter.data.to(dtype)
    return model.eval()
