"""How the units of a model travel: from where they are kept to where they are computed with."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from enum import Enum

import torch

from loadstone.stream.destination import Destination
from loadstone.stream.staying import ALL_GOES, Stays
from loadstone.stream.transfer import NoLink

Rounding = Callable[[str], str | None]


class Keep(Enum):
    """Where the master copy of a unit is kept while the model is in use."""

    DISK = "in its files"
    HOST = "in host memory"
    NEAR = "beside where it is computed, in the dtype that travels"


@dataclass(frozen=True, slots=True, kw_only=True)
class Way:
    """How units travel.

    Attributes:
        destination: where the slots are.
        keep: where a parameter is kept, by fqn; those of a unit are kept together.
        rounding: the dtype that a parameter is rounded to on its way, by fqn; None for none.
        stays: what stays of units that come from files to the host.
    """

    destination: Destination
    keep: Callable[[str], Keep] = lambda _: Keep.DISK
    rounding: Rounding = lambda _: None
    stays: Stays = ALL_GOES


def host_way(stays: Stays = ALL_GOES) -> Way:
    """From the files to where the host computes."""
    return Way(destination=Destination(torch.device("cpu"), NoLink()), stays=stays)
