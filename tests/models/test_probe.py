"""What one pass of a model's code without numbers shows."""

import pytest
import torch

from alphaquant.models.mapping import map_model
from alphaquant.testing.any_model import tiny_model_of

pytestmark = pytest.mark.usefixtures("probed_each_time")


# Models without weights are made with meta as the default device; their map must be the same.
@pytest.mark.parametrize("default_device", ["cpu", "meta"])
def test_code_that_searches_in_its_mask_is_followed_to_its_end(default_device: str) -> None:
    model = tiny_model_of("qwen4_exp_text")
    with torch.device(default_device):
        model_map = map_model(model)
    assert model_map.not_probed is None
    staying = {part.name: part.reason for part in model_map.staying}
    reason = staying["model.layers.1.self_attn.indexer.index_qk_proj.weight"]
    assert reason == "it chooses or weighs, and computes nothing else"
