"""Plans made by hand: the cases that a picture of a plan must show. Figures are those of real models."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

from loadstone.checkpoint.values import TensorInfo
from loadstone.plan.values import (
    DISK,
    HOST,
    DevicePlan,
    Identity,
    Pass,
    Placement,
    Plan,
    Prediction,
    Reservation,
    Run,
    UnitKind,
)

MB, GB = 10**6, 10**9


def _unit(
    unit: str, kind: UnitKind, order: int, nbytes: int, at: str, *, dtype: str = "bfloat16", share: float = 1
) -> Placement:
    """Placed as `at` says: `cuda:0`, `cpu mapped`, or home and compute device, `disk>cpu`."""
    home, _, compute = at.partition(">")
    home, _, mapped = home.partition(" ")
    return Placement(
        unit=unit,
        kind=kind,
        order=order,
        home=home,
        compute=compute or home,
        storage_dtype=dtype,
        compute_dtype=dtype,
        home_bytes=nbytes,
        moved_bytes=int(nbytes * share) if compute else 0,
        mapped=bool(mapped),
    )


def _decoder(blocks: Sequence[str], block_bytes: int, table_bytes: int, ends: tuple[str, str]) -> tuple[Placement, ...]:
    """Embedding, blocks, norm and head of a language model."""
    after = len(blocks) + 1
    return (
        _unit("model.embed_tokens", UnitKind.EMBEDDING, 0, table_bytes, ends[0]),
        *(_unit(f"model.layers.{i}", UnitKind.BLOCK, i + 1, block_bytes, at) for i, at in enumerate(blocks)),
        _unit("model.norm", UnitKind.OTHER, after, 7168, ends[1]),
        _unit("lm_head", UnitKind.HEAD, after + 1, table_bytes, ends[1]),
    )


def _device(
    device: str, name: str, budget: int, placements: Sequence[Placement], reservation: Reservation, level: int = 0
) -> DevicePlan:
    at_home = [placement for placement in placements if placement.home == device]
    return DevicePlan(
        device=device,
        name=name,
        budget_bytes=budget,
        weight_bytes=sum(placement.home_bytes for placement in at_home if not placement.mapped),
        mapped_bytes=sum(placement.home_bytes for placement in at_home if placement.mapped),
        reservation=reservation,
        level_bytes=level,
    )


def _identity(source: str, architecture: str, placements: Sequence[Placement], num_tensors: int) -> Identity:
    return Identity(
        source=source,
        architecture=architecture,
        num_tensors=num_tensors,
        stored_bytes=sum(placement.home_bytes for placement in placements),
        digest="00",
        machine={},
    )


def _prediction(load_s: float, prefill: Pass, decode: Pass, measured: bool = True) -> Prediction:
    return Prediction(load_s=load_s, load_bound_by="disk", prefill=prefill, decode=decode, measured=measured)


def _pass(tokens: int, compute_s: float, transfer_s: float, bound_by: str) -> Pass:
    seconds = max(compute_s, transfer_s)
    return Pass(tokens=tokens, compute_s=compute_s, transfer_s=transfer_s, seconds=seconds, bound_by=bound_by)


def laptop_gpu(label: str = "") -> Plan:
    """Qwen2.5-7B on a laptop with an 8 GB GPU and 16 GB of RAM: some blocks stay in RAM, a few on disk."""
    streamed = {2: HOST, 5: HOST, 8: DISK, 11: HOST, 14: HOST, 17: HOST, 19: DISK, 21: HOST, 23: HOST, 25: HOST}
    more = {3: HOST, 6: HOST, 9: HOST, 12: HOST, 16: HOST, 26: HOST}
    blocks = [f"{home}>cuda:0" if (home := {**streamed, **more}.get(i)) else "cuda:0" for i in range(28)]
    placements = _decoder(blocks, 466_115_584, 1_089_994_752, ("cpu mapped", "cpu mapped"))
    gpu = Reservation(
        kv_cache_bytes=470 * MB, activation_bytes=138 * MB, slot_bytes=932 * MB + 231_168, workspace_bytes=268 * MB
    )
    host = Reservation(logits_bytes=311 * MB, activation_bytes=22 * MB, workspace_bytes=256 * MB)
    return Plan(
        identity=_identity("Qwen/Qwen2.5-7B-Instruct", "Qwen2ForCausalLM", placements, 339),
        run=Run(context=8192, batch=1, prompt_tokens=512),
        dtype="bfloat16",
        placements=placements,
        devices=(
            _device("cuda:0", "NVIDIA GeForce RTX 4060 Laptop GPU", 7600 * MB, placements, gpu),
            _device(HOST, "16 GB RAM", 10 * GB, placements, host, level=610 * MB),
        ),
        prediction=_prediction(4.8, _pass(512, 0.46, 0.655, "link"), _pass(1, 0.078, 0.655, "link")),
        num_slots=2,
        reasons=(
            "The model takes 15.2 GB in bfloat16 and cuda:0 has 7.60 GB, so 12 of 28 blocks stay there and 16 are "
            "brought in for each token.",
            "Streamed blocks stand between resident ones, so that the next one travels while this one computes.",
            "14 of them wait in RAM; the other 2 are read from disk, because the budget of the host is 10.0 GB.",
            "Embedding and head compute on the host, where their tables are used as they lie in the files: the head "
            "would take the place of two blocks on the GPU.",
            "Two slots are enough: the link is the bottleneck, and a third would cost another resident block.",
        ),
        label=label,
    )


def laptop_disk() -> Plan:
    """Qwen2.5-7B on a CPU laptop whose memory is too small: 10 of 28 blocks are read from disk for each token."""
    blocks = ["disk>cpu" if i % 3 == 2 or i == 27 else "cpu mapped" for i in range(28)]
    placements = _decoder(blocks, 466_115_584, 1_089_994_752, ("cpu mapped", "cpu mapped"))
    host = Reservation(
        kv_cache_bytes=235 * MB,
        activation_bytes=80 * MB,
        logits_bytes=40 * MB,
        slot_bytes=1400 * MB,
        workspace_bytes=MB,
    )
    return Plan(
        identity=_identity("./Qwen2.5-7B-Instruct", "Qwen2ForCausalLM", placements, 339),
        run=Run(),
        dtype="bfloat16",
        placements=placements,
        devices=(_device(HOST, "Intel Core i5-1135G7", 13 * GB, placements, host, level=480 * MB),),
        prediction=_prediction(8.4, _pass(512, 21.5, 3.2, "compute"), _pass(1, 0.33, 2.66, "disk"), measured=False),
        num_slots=3,
        reasons=("10 of 28 blocks do not fit in memory beside the others and are read from disk for each token.",),
    )


def eight_gpus() -> Plan:
    """Llama-3.1-70B on eight GPUs of 24 GB: ten blocks on each, nothing streamed."""
    blocks = [f"cuda:{i // 10}" for i in range(80)]
    placements = _decoder(blocks, 1_711_309_824, 2_101_346_304, ("cuda:0", "cuda:7"))
    reservation = Reservation(kv_cache_bytes=168 * MB, activation_bytes=310 * MB, workspace_bytes=512 * MB)
    gpus = [_device(f"cuda:{i}", "NVIDIA RTX A5000", 24 * GB, placements, reservation) for i in range(8)]
    host = _device(HOST, "256 GB RAM", 200 * GB, placements, Reservation(workspace_bytes=512 * MB), level=700 * MB)
    return Plan(
        identity=_identity("meta-llama/Llama-3.1-70B-Instruct", "LlamaForCausalLM", placements, 723),
        run=Run(),
        dtype="bfloat16",
        placements=placements,
        devices=(*gpus, host),
        prediction=_prediction(31, _pass(512, 1.4, 0.001, "compute"), _pass(1, 0.19, 0.0001, "memory")),
        reasons=("The blocks are cut into eight runs of ten, one for each GPU, in the order of execution.",),
    )


def resident() -> Plan:
    """SmolLM2 on the CPU: everything is used where it lies in the file."""
    placements = _decoder(["cpu mapped"] * 30, 7_080_000, 56_623_104, ("cpu mapped", "cpu mapped"))
    host = Reservation(kv_cache_bytes=94 * MB, activation_bytes=9 * MB, logits_bytes=25 * MB)
    return Plan(
        identity=_identity("HuggingFaceTB/SmolLM2-135M-Instruct", "LlamaForCausalLM", placements, 272),
        run=Run(),
        dtype="bfloat16",
        placements=placements,
        devices=(_device(HOST, "AMD EPYC, 2 cores", 8 * GB, placements, host, level=420 * MB),),
        prediction=_prediction(0.2, _pass(512, 0.9, 0, "compute"), _pass(1, 0.021, 0, "memory")),
        reasons=("Everything fits.",),
    )


def mixture() -> Plan:
    """Qwen3-30B-A3B with 20 GB of a GPU: 32 of 128 experts of each block on it, the others in RAM, a few on disk."""
    placements = [_unit("model.embed_tokens", UnitKind.EMBEDDING, 0, 622 * MB, "cuda:0")]
    for i in range(48):
        placements.append(_unit(f"model.layers.{i}", UnitKind.BLOCK, i + 1, 38 * MB, "cuda:0"))
        for expert in range(128):
            at = "cuda:0" if expert < 32 else "cpu>cuda:0" if i < 47 else "disk>cuda:0"
            name = f"model.layers.{i}.mlp.experts.{expert}"
            placements.append(_unit(name, UnitKind.EXPERT, i + 1, 9_437_184, at, share=8 / 128))
    placements.append(_unit("lm_head", UnitKind.HEAD, 49, 622 * MB, "cuda:0"))
    gpu = Reservation(
        kv_cache_bytes=403 * MB, activation_bytes=210 * MB, slot_bytes=1208 * MB, workspace_bytes=300 * MB
    )
    return Plan(
        identity=_identity("Qwen/Qwen3-30B-A3B", "Qwen3MoeForCausalLM", placements, 18_867),
        run=Run(),
        dtype="bfloat16",
        placements=tuple(placements),
        devices=(
            _device("cuda:0", "NVIDIA GeForce RTX 4090", 20 * GB, placements, gpu),
            _device(HOST, "64 GB RAM", 44 * GB, placements, Reservation(workspace_bytes=512 * MB), level=600 * MB),
        ),
        prediction=_prediction(22, _pass(512, 1.1, 2.2, "link"), _pass(1, 0.02, 0.11, "link")),
        num_slots=128,
        reasons=("A token chooses 8 of 128 experts, so experts wait in RAM and the rest of each block stays.",),
    )


def encoder() -> Plan:
    """bert-base: twelve blocks, a pooler, no KV cache."""
    placements = (
        _unit("bert.embeddings", UnitKind.EMBEDDING, 0, 95_362_560, "cuda:0", dtype="float32"),
        *(
            _unit(f"bert.encoder.layer.{i}", UnitKind.BLOCK, i + 1, 28_351_488, "cuda:0", dtype="float32")
            for i in range(12)
        ),
        _unit("bert.pooler", UnitKind.OTHER, 13, 2_362_368, "cuda:0", dtype="float32"),
    )
    return Plan(
        identity=_identity("google-bert/bert-base-uncased", "BertModel", placements, 199),
        run=Run(context=512, batch=8),
        dtype="float32",
        placements=placements,
        devices=(_device("cuda:0", "NVIDIA T4", 15 * GB, placements, Reservation(activation_bytes=160 * MB)),),
        prediction=replace(
            _prediction(0.4, _pass(4096, 0.161, 0, "compute"), _pass(4096, 0.16, 0, "compute"), measured=False),
            generates=False,
        ),
    )


def in_slices() -> Plan:
    """The resident model, less its head, of which only slices fit."""
    plan = resident()
    *others, last = plan.placements
    head = replace(last, kind=UnitKind.HEAD, home=DISK, moved_bytes=last.home_bytes, mapped=False, slice_bytes=16 << 20)
    return replace(plan, placements=(*others, head))


EXAMPLES = {
    "laptop_gpu": laptop_gpu,
    "laptop_disk": laptop_disk,
    "eight_gpus": eight_gpus,
    "resident": resident,
    "mixture": mixture,
    "encoder": encoder,
}

_QWEN_BLOCK = {
    "input_layernorm.weight": (3584,),
    "self_attn.q_proj.bias": (3584,),
    "self_attn.q_proj.weight": (3584, 3584),
    "self_attn.k_proj.bias": (512,),
    "self_attn.k_proj.weight": (512, 3584),
    "self_attn.v_proj.bias": (512,),
    "self_attn.v_proj.weight": (512, 3584),
    "self_attn.o_proj.weight": (3584, 3584),
    "post_attention_layernorm.weight": (3584,),
    "mlp.gate_proj.weight": (18944, 3584),
    "mlp.up_proj.weight": (18944, 3584),
    "mlp.down_proj.weight": (3584, 18944),
}


def tensor(
    name: str, shape: tuple[int, ...], file: str = "model.safetensors", encoding: str | None = None
) -> TensorInfo:
    numel = 1
    for size in shape:
        numel *= size
    return TensorInfo(
        name=name, dtype="bfloat16", shape=shape, file=Path(file), offset=0, nbytes=2 * numel, encoding=encoding
    )


def tensors_of(plan: Plan) -> dict[str, list[TensorInfo]]:
    """The tensors of each unit of a Qwen2.5-7B or of a mixture of experts."""
    found = {}
    for placement in plan.placements:
        file = f"model-{1 + placement.order * 4 // 32:05d}-of-00004.safetensors"
        shapes: dict[str, tuple[int, ...]] = {"weight": (152064, 3584)}
        if placement.kind is UnitKind.BLOCK:
            shapes = _QWEN_BLOCK
        elif placement.kind is UnitKind.EXPERT:
            shapes = {f"{name}_proj.weight": (768, 2048) for name in ("gate", "up", "down")}
        elif placement.kind is UnitKind.OTHER:
            shapes = {"weight": (3584,)}
        found[placement.unit] = [tensor(f"{placement.unit}.{leaf}", shape, file) for leaf, shape in shapes.items()]
    return found
