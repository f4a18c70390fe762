"""The methods by name. Adding one is a file here and a line below."""

from pathlib import Path

from semiseg.methods.advsemiseg import AdvSemiSeg
from semiseg.methods.base import Method, StepMethod
from semiseg.methods.cps import CPS
from semiseg.methods.cutmixseg import CutMixSeg
from semiseg.methods.fixmatch import FixMatch
from semiseg.methods.meanteacher import MeanTeacher
from semiseg.methods.selftraining import SelfTraining
from semiseg.methods.st import ST
from semiseg.methods.stplusplus import STPlusPlus
from semiseg.methods.supervised import Supervised
from semiseg.methods.transfer import Transfer
from semiseg.methods.u2pl import U2PL
from semiseg.methods.unimatch import UniMatch
from semiseg.methods.unimatchv2 import UniMatchV2
from semiseg.networks.factory import load_object
from semiseg.types import InputError, described, nearest

METHODS: dict[str, type[Method]] = {
    "supervised": Supervised,
    "fixmatch": FixMatch,
    "advsemiseg": AdvSemiSeg,
    "meanteacher": MeanTeacher,
    "cutmixseg": CutMixSeg,
    "u2pl": U2PL,
    "selftraining": SelfTraining,
    "transfer": Transfer,
    "st": ST,
    "st++": STPlusPlus,
    "cps": CPS,
    "unimatch": UniMatch,
    "unimatchv2": UniMatchV2,
}

DEFAULT = "fixmatch"


def find(name: str, base: Path | None = None) -> type[Method]:
    """The method called `name`, or the class that an import string (`file.py:Class`, `package.module:Class`) names.

    Raises:
        InputError: no such method, or the object is not one.
    """
    if ":" in name:
        found = load_object(name, base)
        if not (isinstance(found, type) and issubclass(found, Method)):
            raise InputError(f"method.name: {name} is not a subclass of semiseg.methods.Method.")
        return found
    if name not in METHODS:
        raise InputError(f"method.name: {name} is unknown; {nearest(name, METHODS)}")
    return METHODS[name]


def describe(method: type[Method]) -> dict[str, tuple[str, str]]:
    """Every option of a method with its default and its meaning; a group's options are joined to its name by a dot."""
    return described(method.Config)


__all__ = [
    "CPS",
    "DEFAULT",
    "METHODS",
    "ST",
    "U2PL",
    "AdvSemiSeg",
    "CutMixSeg",
    "FixMatch",
    "MeanTeacher",
    "Method",
    "STPlusPlus",
    "SelfTraining",
    "StepMethod",
    "Supervised",
    "Transfer",
    "UniMatch",
    "UniMatchV2",
    "describe",
    "find",
]
