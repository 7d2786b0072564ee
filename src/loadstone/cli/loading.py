"""Loading as the commands do it: the options they share, the demo model where no source is named, progress."""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable
from dataclasses import dataclass, fields
from typing import TYPE_CHECKING, Any, get_type_hints

from loadstone.cli import options

if TYPE_CHECKING:
    from torch import nn

    from loadstone.events import Observer


@dataclass(frozen=True, slots=True, kw_only=True)
class SourceOptions:
    """The options of every command that opens a checkpoint; see `loadstone.inspect`."""

    revision: options.Revision = None
    subfolder: options.Subfolder = None
    variant: options.Variant = None
    prefix: options.Prefix = None
    select: options.SelectOption = None
    local_files_only: options.LocalOnly = False


@dataclass(frozen=True, slots=True, kw_only=True)
class LoadOptions(SourceOptions):
    """The options of every command that loads; see `loadstone.load`."""

    architecture: options.Architecture = None
    dtype: options.Dtype = None
    device: options.DeviceOption = None
    attn_implementation: options.Attention = None
    max_memory: options.MaxMemory = None
    device_map: options.DeviceMap = None
    context: options.Context = None
    batch: options.Batch = None
    no_offload: options.NoOffload = False
    plan: options.PlanFile = None
    trust_remote_code: options.TrustRemoteCode = False
    no_strict: options.NotStrict = False

    @classmethod
    def of(cls, wanted: SourceOptions) -> LoadOptions:
        """The source that is wanted, loaded as by default."""
        return cls(**{field.name: getattr(wanted, field.name) for field in fields(SourceOptions)})


def with_options(command: Callable[..., None]) -> Callable[..., None]:
    """The command with the options of a dataclass in the place of its parameter `wanted`, which is annotated with it.

    Typer reads a command's options from its signature, so that is what is rewritten.
    """
    declared = inspect.signature(command, eval_str=True).parameters
    kind: type[SourceOptions] = declared["wanted"].annotation
    hints = get_type_hints(kind, include_extras=True)
    shared = [
        inspect.Parameter(
            field.name, inspect.Parameter.KEYWORD_ONLY, default=field.default, annotation=hints[field.name]
        )
        for field in fields(kind)
    ]

    @functools.wraps(command)
    def flat(**values: Any) -> None:
        wanted = kind(**{field.name: values.pop(field.name) for field in fields(kind)})
        command(wanted=wanted, **values)

    parameters: list[inspect.Parameter] = []
    for parameter in declared.values():
        if parameter.name == "wanted":
            parameters.extend(shared)
        else:
            parameters.append(parameter.replace(kind=inspect.Parameter.KEYWORD_ONLY))
    flat.__signature__ = inspect.Signature(parameters)  # type: ignore[attr-defined]
    flat.__annotations__ = {parameter.name: parameter.annotation for parameter in parameters}
    return flat


def source_or_demo(source: str | None, observer: Observer) -> str:
    """The source of a command, or the demo model where none is named.

    Args:
        source: as on the command line.
        observer: draws progress.
    """
    if source is not None:
        return source
    from loadstone.checkpoint.demo import demo_model

    return str(demo_model(observer))


def load_model(
    source: str | None, wanted: LoadOptions, prompt_tokens: int | None = None, *, observer: Observer
) -> tuple[nn.Module, str]:
    """Load a model as a command asks for it.

    Args:
        source: as on the command line; None means the demo model.
        wanted: the command's options.
        prompt_tokens: of the prompt at most, where it is known.
        observer: draws progress.

    Returns:
        The model, and the source that it was loaded from.
    """
    from loadstone.api.load import load

    path = source_or_demo(source, observer)
    model = load(
        path,
        architecture=wanted.architecture,
        dtype=wanted.dtype,
        device=wanted.device,
        attn_implementation=wanted.attn_implementation,
        max_memory=wanted.max_memory,
        device_map=options.read_device_map(wanted.device_map),
        context=wanted.context,
        batch=wanted.batch,
        prompt_tokens=None if wanted.plan is not None else prompt_tokens,
        offload=not wanted.no_offload,
        plan=options.read_plan(wanted.plan),
        revision=wanted.revision,
        subfolder=wanted.subfolder,
        variant=wanted.variant,
        prefix=wanted.prefix,
        select=wanted.select or None,
        local_files_only=wanted.local_files_only,
        trust_remote_code=wanted.trust_remote_code,
        strict=not wanted.no_strict,
        progress=observer,
    )
    return model, path
