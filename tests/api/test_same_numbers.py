"""The same model as transformers' own load: every tensor, buffer and output, bit by bit.

The spread covers dense, grouped-query, fused-expert, tied, sliding-window and state-space models, encoders, seq2seq,
vision and audio, every file format, and casts. `tests/architecture_sweep.py` does the same for every type there is.
"""

import sys
import warnings
from pathlib import Path

import pytest
import torch
import transformers

sys.path.insert(0, str(Path(__file__).parents[1]))

import builders
import loadstone
from architecture_sweep import differences, same_outputs

FORMATS: tuple[builders.Format, ...] = ("safetensors", "sharded safetensors", "bin", "sharded bin")
DTYPES = {"bfloat16": torch.bfloat16, "float32": torch.float32}
# (stored, asked for): as stored, and both casts.
CASES = (("bfloat16", "auto"), ("float32", "auto"), ("bfloat16", "float32"), ("float32", "bfloat16"))

TYPES = {
    "causal": (
        "llama mistral qwen2 qwen3 gemma gemma2 gemma3_text phi phi3 gpt2 gpt_neox bloom falcon opt starcoder2 "
        "stablelm cohere olmo2 mixtral qwen2_moe qwen3_moe deepseek_v3 gpt_oss olmoe granitemoe jetmoe mamba mamba2 "
        "falcon_mamba jamba bamba recurrent_gemma rwkv lfm2 qwen3_next"
    ),
    "seq2seq": "t5 bart mbart pegasus",
    "encoder": "bert roberta distilbert electra deberta-v2 modernbert",
    "image": "vit resnet dinov2 mobilenet_v2",
    "contrastive": "clip siglip",
    "ctc": "wav2vec2 hubert",
    "speech": "whisper",
    "image-text": "llava paligemma",
}
SPREAD = [(kind, model_type) for kind, names in TYPES.items() for model_type in names.split()]


@pytest.fixture(autouse=True)
def quiet() -> None:
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()


@pytest.mark.filterwarnings("ignore")  # of third parties: transformers warns of missing kernels and of its own renames
@pytest.mark.parametrize(("number", "kind", "model_type"), [(i, *one) for i, one in enumerate(SPREAD)])
def test_a_load_equals_from_pretrained(tmp_path: Path, number: int, kind: str, model_type: str) -> None:
    # Formats and casts go round so that each occurs with many types.
    stored, wanted = CASES[number % len(CASES)]
    file_format = FORMATS[number // len(CASES) % len(FORMATS)]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        model = builders.tiny_model(model_type, kind, DTYPES[stored])
        builders.write_checkpoint(model, tmp_path, file_format)
        theirs = type(model).from_pretrained(tmp_path, dtype=wanted)
        ours = loadstone.load(tmp_path, dtype=wanted, architecture=type(model).__name__)
        assert differences(ours, theirs) == []
        inputs = builders.sample_inputs(theirs, kind)
        expected = builders.outputs(theirs, inputs)
        assert expected
        assert same_outputs(builders.outputs(ours, inputs), expected)
