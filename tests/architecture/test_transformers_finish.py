"""What happens to tensors that a load did not bring."""

import torch
from torch import nn
from transformers import PreTrainedConfig, PreTrainedModel

from loadstone.architecture.transformers import Described, build, finish

FROM_INITIALISER, FROM_FILE = 7.0, 1.0


class Twice(PreTrainedModel):
    """One layer under two names."""

    config_class = PreTrainedConfig

    def __init__(self, config):
        super().__init__(config)
        self.first = nn.Linear(2, 2)
        self.second = self.first
        self.post_init()

    def _init_weights(self, module):
        if isinstance(module, nn.Linear):
            nn.init.constant_(module.weight, FROM_INITIALISER)
            nn.init.constant_(module.bias, FROM_INITIALISER)


def test_what_a_shared_layer_lacks_is_initialised_and_the_rest_is_kept():
    model = build(Described(config=PreTrainedConfig(), model_class=Twice, chosen_by="the test"), torch.float32)
    model.first.weight = nn.Parameter(torch.full((2, 2), FROM_FILE))
    finish(model, {"first.bias", "second.bias"}, torch.device("cpu"))
    assert model.first.weight.eq(FROM_FILE).all()
    assert model.second.bias.eq(FROM_INITIALISER).all()
    assert model.second.bias is model.first.bias
