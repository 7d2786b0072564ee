"""Malformed indexes, configs, tokenizers and lists of files."""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from loadstone.checkpoint.sharded import MAX_INDEX_BYTES
from loadstone.errors import (
    CheckpointMismatch,
    InvalidConfig,
    InvalidHeader,
    InvalidIndex,
    InvalidTemplate,
    LoadstoneError,
    MissingShard,
    NotACheckpoint,
    RemoteCodeRefused,
    UnknownArchitecture,
    UnsupportedFormat,
)
from malformed_base import CANARY, GOOD, Case, Control, Through, Writer, entry, files, safetensors, sparse

INDEX = "model.safetensors.index.json"
ONE, TWO = "model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors"
OTHER = safetensors({"b": entry()}, bytes(4))
SHARDS = {ONE: GOOD, TWO: OTHER}


def _index(name: str, content: Any, message: str, error: type[LoadstoneError] = InvalidIndex) -> Case:
    """Two good shards under an index that is wrong."""
    return Case(name=f"index: {name}", write=files({**SHARDS, INDEX: content}), error=error, message=message)


def _outside(name: str, shard: object, message: str = "in its own folder") -> Case:
    return _index(name, {"weight_map": {"a": ONE, "b": shard}}, message)


def _linked_out(folder: Path) -> Path:
    """A shard that is a FIFO, which is waited for where it is opened plainly."""
    files({ONE: GOOD, INDEX: {"weight_map": {"a": ONE, "b": TWO}}})(folder)
    os.mkfifo(folder / TWO)
    return folder


def _index_fifo(folder: Path) -> Path:
    os.mkfifo(folder / INDEX)
    return folder


def _shard_loop(folder: Path) -> Path:
    files({ONE: GOOD, INDEX: {"weight_map": {"a": ONE, "b": TWO}}})(folder)
    (folder / TWO).symlink_to(TWO)
    return folder


_SHARDED = {"weight_map": {"a": ONE, "b": TWO}}

INDEXES = (
    _outside("shard above the folder", "../secret.safetensors"),
    _outside("shard above the folder, deep", "sub/../../secret.safetensors"),
    _outside("shard with backslashes", "..\\secret.safetensors"),
    _outside("shard by absolute path", "/etc/passwd"),
    _outside("shard on a Windows drive", "C:\\secret.safetensors"),
    _outside("shard without a name", ""),
    _outside("shard with a NUL", "a\0b"),
    _outside("shard the folder itself", "."),
    _outside("shard a number", 7, "found a int"),
    _outside("shard a list", [ONE], "expected the name of a file"),
    _outside("shard null", None, "found a NoneType"),
    _index("shard missing", {"weight_map": {"a": ONE, "b": "third.safetensors"}}, "third.safetensors", MissingShard),
    _index("1,000 shards missing", {"weight_map": {str(i): f"{i}.bin" for i in range(1000)}}, "999 more", MissingShard),
    _index("tensor in the wrong shard", {"weight_map": {"a": TWO, "b": ONE}}, f"expected tensor 'b' in {ONE}"),
    _index("ghost tensor", {"weight_map": {"a": ONE, "b": TWO, "ghost": TWO}}, "expected tensor 'ghost'"),
    _index("no weight_map", {"metadata": {}}, "expected a weight_map"),
    _index("weight_map empty", {"weight_map": {}}, "expected a weight_map"),
    _index("weight_map a list", {"weight_map": [ONE]}, "expected a weight_map"),
    _index("a list", [ONE, TWO], "expected a JSON object, found a list"),
    _index("not JSON", b"weight_map", "expected JSON"),
    _index("not UTF-8", b'{"weight_map": {"\xff": 1}}', "expected UTF-8"),
    _index("tensor twice", b'{"weight_map": {"a": "x", "a": "y"}}', "the key 'a' stands there twice"),
    _index("deep nesting", b'{"weight_map":' * 50_000, "nested too deeply"),
    _index("bomb of lists", lambda: b'{"weight_map":[' + b"[]," * 5_000_000 + b"0]}", "brackets"),
    Case(
        name="index: too large",
        write=sparse(INDEX, MAX_INDEX_BYTES + 1, b"{"),
        error=InvalidIndex,
        message="of JSON, found",
    ),
    Case(
        name="index: as large as may be, of zeros",
        write=sparse(INDEX, MAX_INDEX_BYTES, b"{"),
        error=InvalidIndex,
        message="expected JSON",
    ),
    Case(name="index: a FIFO", write=_index_fifo, error=NotACheckpoint, message="found a pipe, socket or device"),
    Case(name="index: shard a FIFO", write=_linked_out, error=MissingShard, message=TWO),
    Case(name="index: shard a loop of links", write=_shard_loop, error=MissingShard, message=TWO),
    Case(
        name="index: shards of two formats",
        write=files({ONE: GOOD, TWO: b"GGUF" + (3).to_bytes(4, "little") + bytes(16), INDEX: _SHARDED}),
        error=UnsupportedFormat,
        message="pass files of one format",
    ),
    Case(
        name="list: a tensor in two files",
        write=lambda folder: (files({"x": GOOD, "y": GOOD})(folder), [folder / "x", folder / "y"])[1],
        error=InvalidHeader,
        message="expected each tensor in one file",
    ),
    Case(
        name="folder: a part of a numbered set missing",
        write=files({TWO: OTHER}),
        error=MissingShard,
        message="expected 2 files like model-00002-of-00002.safetensors, found 1",
    ),
)

_LLAMA: dict[str, Any] = {
    "model_type": "llama",
    "architectures": ["LlamaForCausalLM"],
    "hidden_size": 8,
    "intermediate_size": 8,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "vocab_size": 8,
}


def llama(changes: Mapping[str, Any] | None = None, **more: bytes | Any) -> Writer:
    """A tiny Llama with the tensors that its config asks for, and a config that is changed."""
    header, data = _llama_tensors()
    return files({"model.safetensors": safetensors(header, data), "config.json": {**_LLAMA, **(changes or {})}, **more})


def _llama_tensors() -> tuple[dict[str, object], bytes]:
    shapes = {
        "model.embed_tokens.weight": (8, 8),
        "lm_head.weight": (8, 8),
        "model.norm.weight": (8,),
        **{f"model.layers.0.self_attn.{name}_proj.weight": (8, 8) for name in "qkvo"},
        **{f"model.layers.0.mlp.{name}_proj.weight": (8, 8) for name in ("gate", "up", "down")},
        **{f"model.layers.0.{name}_layernorm.weight": (8,) for name in ("input", "post_attention")},
    }
    header: dict[str, object] = {}
    at = 0
    for name, shape in shapes.items():
        nbytes = 4 * (64 if len(shape) == 2 else 8)
        header[name] = entry("F32", shape, at, at + nbytes)
        at += nbytes
    return header, bytes(at)


def _stranger(title: str, tensor: str, message: str) -> Case:
    """A good model with one tensor more, of an odd name."""
    header, data = _llama_tensors()
    header[tensor] = entry("F32", (1,), len(data), len(data) + 4)
    content = safetensors(header, data + bytes(4))
    return Case(
        name=f"model: {title}",
        write=files({"model.safetensors": content, "config.json": _LLAMA}),
        error=CheckpointMismatch,
        message=message,
        through=Through.LOAD,
    )


def _config(name: str, content: Any, message: str, error: type[LoadstoneError] = InvalidConfig) -> Case:
    """A good file beside a config.json that cannot be read."""
    write = files({"model.safetensors": GOOD, "config.json": content})
    return Case(name=f"config: {name}", write=write, error=error, message=message)


def _lie(name: str, changes: dict[str, Any], message: str, error: type[LoadstoneError] = InvalidConfig) -> Case:
    """A good model whose config.json lies; the headers alone are in order."""
    return Case(name=f"config: {name}", write=llama(changes), error=error, message=message, through=Through.LOAD)


def _config_fifo(folder: Path) -> Path:
    files({"model.safetensors": GOOD})(folder)
    os.mkfifo(folder / "config.json")
    return folder


def _special(name: str, make: Callable[[Path], None]) -> Writer:
    """A good model and tokenizer, in which one file is no file."""

    def write(folder: Path) -> Path:
        llama(None, **tokenizer_files("hello"))(folder)
        (folder / name).unlink(missing_ok=True)
        make(folder / name)
        return folder

    return write


def _gigabyte(path: Path) -> None:
    with path.open("wb") as file:
        file.truncate(10**9)


_CODE = f"open({CANARY!r}, 'w').close()\n".encode()
_REMOTE = {"auto_map": {"AutoConfig": "own.Own", "AutoModelForCausalLM": "own.Own"}, "model_type": "own"}

CONFIGS = (
    _config("a list", [1, 2], "expected a JSON object, found a list"),
    _config("not JSON", b"{", "expected JSON"),
    _config("not UTF-8", b'{"a": "\xff"}', "expected UTF-8"),
    _config("a key twice", b'{"a": 1, "a": 2}', "the key 'a' stands there twice"),
    _config("deep nesting", b'{"a":' * 100_000, "nested too deeply"),
    _config("bomb of lists", lambda: b'{"a":[' + b"[]," * 4_000_000 + b"0]}", "brackets"),
    Case(
        name="config: of 1 GB",
        write=sparse("config.json", 10**9, b"{", {"model.safetensors": GOOD}),
        error=InvalidConfig,
        message="expected at most 16.0 MB of JSON, found 1.00 GB",
    ),
    Case(name="config: a FIFO", write=_config_fifo, error=NotACheckpoint, message="found a pipe, socket or device"),
    Case(
        name="generation config: a list",
        write=files({"model.safetensors": GOOD, "generation_config.json": []}),
        error=InvalidConfig,
        message="generation_config.json: expected a JSON object",
    ),
    _config("nested 500 levels", b'{"a":' + b"[" * 500 + b"]" * 500 + b"}", "expected JSON of at most 64 levels"),
    _lie("ten million layers", {"num_hidden_layers": 10**7}, "num_hidden_layers is 10,000,000"),
    _lie("more layers than a float holds", {"num_hidden_layers": 1e30}, "num_hidden_layers"),
    _lie("layers a text", {"num_hidden_layers": "many"}, "num_hidden_layers"),
    _lie("no layers", {"num_hidden_layers": 0}, "model.layers.0.", CheckpointMismatch),
    _lie("layers negative", {"num_hidden_layers": -3}, "model.layers.0.", CheckpointMismatch),
    _lie("two layers, one is there", {"num_hidden_layers": 2}, "model.layers.1.", CheckpointMismatch),
    _lie("wider than the files", {"hidden_size": 16}, "expected [8, 16], found [8, 8]", CheckpointMismatch),
    _lie("as wide as an integer", {"hidden_size": 2**62}, "cannot be built from the config"),
    _lie("wider than an integer", {"hidden_size": 10**30}, "cannot be built from the config"),
    _lie("hidden size a list", {"hidden_size": [8]}, "hidden_size"),
    _lie("width negative", {"intermediate_size": -8}, "negative dimension -8"),
    _lie("a vocabulary of 10^15", {"vocab_size": 10**15}, "another shape", CheckpointMismatch),
    _lie("no heads", {"num_attention_heads": 0}, "does not accept it"),
    _lie("heads that do not divide", {"num_attention_heads": 3}, "not a multiple of the number of attention heads"),
    _lie("no model_type", {"model_type": None, "architectures": None}, "model_type"),
    _lie("model_type a list", {"model_type": ["llama"]}, "model_type"),
    _lie("model_type a path", {"model_type": "../llama"}, "model_type", UnknownArchitecture),
    _lie("class of another library", {"architectures": ["os.system"]}, "os.system", UnknownArchitecture),
    _lie("class that is none", {"architectures": ["logging"]}, "logging", UnknownArchitecture),
    _lie("architectures a number", {"architectures": 7}, "architectures"),
    _lie("unknown activation", {"hidden_act": "__import__('os')"}, "cannot be built from the config"),
    _lie(
        "unknown rope type", {"rope_scaling": {"rope_type": "../x", "factor": 2.0}}, "cannot be built from the config"
    ),
    Case(
        name="config: brings code",
        write=files({"model.safetensors": GOOD, "config.json": _REMOTE, "own.py": _CODE}),
        error=RemoteCodeRefused,
        message="which is not run unless you read it",
        through=Through.LOAD,
    ),
)

# Each template would leave a file behind, or a program's inner values, where it is not kept in its box.
TEMPLATES = {
    "walks to subclasses": "{{ ''.__class__.__mro__[1].__subclasses__() }}",
    "walks to globals": "{{ messages.append.__self__.__class__.__base__ }}{{ cycler.__init__.__globals__.os }}",
    "calls os through lipsum": "{{ lipsum.__globals__['os'].system('touch " + CANARY + "') }}",
    "formats its way out": "{{ '{0.__class__.__init__.__globals__}'.format(messages) }}",
    "attr filter": "{{ (messages|attr('__class__')).mro() }}",
    "changes the messages": "{{ messages.append(1) }}",
    "range of a billion": "{% for i in range(10**9) %}x{% endfor %}",
    "raises": "{{ raise_exception('no') }}",
    "does not parse": "{% for %}",
    "imports": "{% import 'os' as os %}{{ os }}",
    "divides by zero": "{{ 1 // 0 }}",
    "allocates 100 GB": "{{ 'x' * 100000000000 }}",
    "recursion": "{% macro m() %}{{ m() }}{% endmacro %}{{ m() }}",
}
_WORDS = {"<unk>": 0, "<s>": 1, "</s>": 2, "hello": 3}


def tokenizer_files(template: str) -> dict[str, Any]:
    """A tiny tokenizer with a chat template."""
    return {
        "tokenizer.json": {
            "version": "1.0",
            "added_tokens": [],
            "model": {"type": "WordLevel", "vocab": _WORDS, "unk_token": "<unk>"},
        },
        "tokenizer_config.json": {
            "tokenizer_class": "PreTrainedTokenizerFast",
            "unk_token": "<unk>",
            "chat_template": template,
        },
    }


def _tokenizer(name: str, changes: dict[str, Any], message: str) -> Case:
    write = llama(None, **{**tokenizer_files("hello"), **changes})
    return Case(
        name=f"tokenizer: {name}", write=write, error=NotACheckpoint, message=message, through=Through.TOKENIZER
    )


TOKENIZERS = (
    _tokenizer("not JSON", {"tokenizer.json": b"{"}, "no tokenizer could be loaded"),
    _tokenizer("a list", {"tokenizer.json": []}, "no tokenizer could be loaded"),
    _tokenizer("of an unknown kind", {"tokenizer.json": {"model": {"type": "Evil"}}}, "no tokenizer could be loaded"),
    _tokenizer("config a list", {"tokenizer_config.json": []}, "no tokenizer could be loaded"),
    _tokenizer(
        "brings code",
        {
            "tokenizer_config.json": {"auto_map": {"AutoTokenizer": ["own.Own", "own.Own"]}, "tokenizer_class": "Own"},
            "own.py": _CODE,
        },
        "no tokenizer could be loaded",
    ),
    *(
        Case(name=f"tokenizer: {name}", write=write, error=NotACheckpoint, message=message, through=Through.TOKENIZER)
        for name, write, message in (
            ("a FIFO", _special("tokenizer.json", os.mkfifo), "found a pipe, socket or device"),
            ("config a FIFO", _special("tokenizer_config.json", os.mkfifo), "found a pipe, socket or device"),
            ("template a FIFO", _special("chat_template.jinja", os.mkfifo), "found a pipe, socket or device"),
            ("a folder", _special("tokenizer.json", Path.mkdir), "no tokenizer could be loaded"),
            ("of 1 GB", _special("tokenizer.json", _gigabyte), "expected at most 64.0 MB of a tokenizer"),
        )
    ),
    *(
        Case(
            name=f"chat template: {name}",
            write=llama(None, **tokenizer_files(template)),
            error=InvalidTemplate,
            message="chat template",
            through=Through.CHAT,
        )
        for name, template in TEMPLATES.items()
    ),
)

STRANGERS = (
    _stranger("tensor name of 100,000 characters", "x" * 100_000, "xxx..."),
    _stranger("tensor name of control characters", "a\n\x1b[2J", r"module: a\n\x1b[2J"),
    _stranger("block number of 5,000 digits", f"model.layers.{'9' * 5000}.x", "model.layers.999"),
    _stranger("block number that is no number", "model.layers.\u00b2.x", "model.layers.\u00b2.x"),
    _stranger("name of 10,000 parts", "x." * 10_000, "module: x.x."),
)

CASES = (*INDEXES, *CONFIGS, *STRANGERS, *TOKENIZERS)

ODD_NAMES = ("[/red]x", "a\x1b[2J", "model.layers." + "9" * 5000 + ".x", "model.layers.\u0661.x", "..", "")

CONTROLS = (
    Control(name="index: no metadata", write=files({**SHARDS, INDEX: _SHARDED}), tensors=("a", "b")),
    Control(
        name="index: metadata a list", write=files({**SHARDS, INDEX: {**_SHARDED, "metadata": []}}), tensors=("a", "b")
    ),
    Control(
        name="index: a wrong total_size",
        write=files({**SHARDS, INDEX: {**_SHARDED, "metadata": {"total_size": 10**18}}}),
        tensors=("a", "b"),
    ),
    Control(
        name="index: an extra shard that it does not name",
        write=files({**SHARDS, "extra.safetensors": b"nothing", INDEX: _SHARDED}),
        tensors=("a", "b"),
    ),
    Control(
        name="index: an unlisted tensor in a shard",
        write=files(
            {ONE: GOOD, TWO: safetensors({"b": entry(), "c": entry(begin=4, end=8)}, bytes(8)), INDEX: _SHARDED}
        ),
        tensors=("a", "b"),
    ),
    Control(
        name="index: shards in a subfolder",
        write=files({"sub/x.safetensors": GOOD, INDEX: {"weight_map": {"a": "sub/x.safetensors"}}}),
    ),
    Control(
        name="tensors: names that a terminal or a report could obey",
        write=files({"model.safetensors": safetensors({name: entry(shape=(0,), end=0) for name in ODD_NAMES})}),
        tensors=tuple(sorted(ODD_NAMES)),
    ),
    Control(
        name="config: of unknown fields",
        write=files({"model.safetensors": GOOD, "config.json": {"hidden_size": "wide", "x": [[1], {}], "": None}}),
    ),
)
