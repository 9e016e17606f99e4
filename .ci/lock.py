"""Print the exact versions of everything installed for `.[all]`, as pip constraints.

torch and torchvision stay ranges, because a CPU and a GPU machine install different builds of them; what they alone
bring in is left out with them.
"""

from importlib.metadata import PackageNotFoundError, distribution

from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

RANGES = {"torch", "torchvision"}


def closure(requirement: Requirement, found: dict[str, str], done: set[str]) -> None:
    """Add to `found` the version of the required package and of all that it requires in turn."""
    name = canonicalize_name(requirement.name)
    key = f"{name}[{','.join(sorted(requirement.extras))}]"
    if name in RANGES or key in done:
        return
    done.add(key)
    try:
        package = distribution(name)
    except PackageNotFoundError:  # optional on this platform
        return
    found[name] = package.version
    for text in package.requires or ():
        needed = Requirement(text)
        if needed.marker is None or any(needed.marker.evaluate({"extra": e}) for e in requirement.extras or {""}):
            closure(needed, found, done)


found: dict[str, str] = {}
closure(Requirement("companion-papers[all]"), found, set())
del found["companion-papers"]
print("# Written by `make lock`: pip constraints for everything but torch and torchvision. Used by `make reports`.")
for name, version in sorted(found.items()):
    print(f"{name}=={version}")
