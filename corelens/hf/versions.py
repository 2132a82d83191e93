"""The versions that the tests ran on, and a warning outside them."""

import warnings
from functools import cache
from importlib.metadata import PackageNotFoundError, version

from packaging.version import Version

# package: (lowest tested version, the next one that is not tested); pyproject.toml says the same,
# and why.
TESTED = {
    "torch": ("2.11", "3"),
    "transformers": ("5.17", "5.25"),
    "transformer-lens": ("4.2", "5"),
}


def untested() -> list[str]:
    """For each installed package outside the tested range a text such as "transformers 5.26.0
    (tested: 5.17 to …)"."""
    outside = []
    for package, (lowest, limit) in TESTED.items():
        try:
            installed = version(package)
        # a module on the path that was never installed says no version
        except PackageNotFoundError:
            continue
        # (releases alone are compared: 5.25.0.dev0 is of the new minor, though it sorts before
        # 5.25)
        if not Version(lowest).release <= Version(installed).release < Version(limit).release:
            outside.append(f"{package} {installed} (tested: {lowest} and later, before {limit})")
    return outside


@cache
def warn_if_untested() -> None:
    """Warn, once a process, if an installed version is outside the tested range."""
    if outside := untested():
        warnings.warn(
            f"CoreLens was not tested with {', '.join(outside)}. Hooked runs may differ from the "
            "model: "
            "`corelens doctor` measures it on this machine.",
            stacklevel=3,
        )
