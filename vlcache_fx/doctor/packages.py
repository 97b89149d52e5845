"""Versions of Python, of this package, and of those that it requires."""

from __future__ import annotations

import platform
import sys
from collections.abc import Sequence

import vlcache_fx
from vlcache_fx.doctor.check import Check, Status
from vlcache_fx.doctor.requirements import PACKAGE, Requirement, of_extra, requirements


def check_python() -> Check:
    """Python and the platform."""
    return Check("python", Status.OK, f"{platform.python_version()}, {sys.executable}, {platform.platform()}")


def check_package() -> Check:
    """This package, and what it always requires."""
    found = [requirement for requirement in requirements() if requirement.extra is None]
    missing, misfits, there = _sorted(found)
    text = f"{vlcache_fx.__version__} with {', '.join(there)}"
    if missing or misfits:
        problem = _problem(missing, misfits)
        return Check("vlcache_fx", Status.FAILED, f"{text}; {problem}", f"pip install {PACKAGE}")
    return Check("vlcache_fx", Status.OK, text)


def check_torch() -> Check:
    """torch: its version, and what it was built for."""
    import torch

    (required,) = (one for one in requirements() if one.name == "torch" and one.extra is None)
    built = "for CPUs" if torch.version.cuda is None else f"for CUDA {torch.version.cuda}"
    text = f"{torch.__version__}, built {built}"
    if required.fits(torch.__version__):
        return Check("torch", Status.OK, text)
    return Check("torch", Status.FAILED, f"{text}; required is {required}", f"pip install '{required}'")


def check_transformers() -> Check:
    """transformers, which ``vlcache_fx.compile`` of its models and the server need."""
    required = next(of_extra("transformers", requirements()))
    installed = required.installed
    advice = "pip install 'vlcache_fx[transformers]'"
    if installed is None:
        return Check("transformers", Status.WARNING, "not installed", f"{advice}, for models of transformers")
    if not required.fits(installed):
        return Check("transformers", Status.FAILED, f"{installed}; required is {required}", advice)
    return Check("transformers", Status.OK, installed)


def check_extra(extra: str) -> Check:
    """An extra: which of its packages are installed. None of them is needed for the rest."""
    name = f"extra {extra}"
    missing, misfits, there = _sorted(list(of_extra(extra, requirements())))
    text = ", ".join(there) or "not installed"
    advice = f"pip install 'vlcache_fx[{extra}]'"
    if misfits:
        return Check(name, Status.WARNING, f"{text}; {_problem(missing, misfits)}", advice)
    if missing:
        text = f"not complete: {_problem(missing, misfits)}; {text}" if there else text
        return Check(name, Status.OK, text, f"{advice}, if you need it")
    return Check(name, Status.OK, text)


def _sorted(found: Sequence[Requirement]) -> tuple[list[str], list[str], list[str]]:
    """Return names of missing packages, those of other versions, and names with versions of all that fit."""
    missing, misfits, there = [], [], []
    for requirement in found:
        installed = requirement.installed
        if installed is None:
            missing.append(requirement.name)
        elif not requirement.fits(installed):
            misfits.append(f"{requirement.name} {installed} instead of {requirement}")
        else:
            there.append(f"{requirement.name} {installed}")
    return missing, misfits, there


def _problem(missing: Sequence[str], misfits: Sequence[str]) -> str:
    return ", ".join([*(f"{name} is missing" for name in missing), *misfits])
