"""Which names inside a pickle mean data, and which mean that the file wants to run code.

Our reader imports and calls nothing, whatever a file says. This policy only decides which files are
refused outright: the ones that would run code in a reader less careful than ours.
"""

import reprlib
import sys

from dfq_jax.errors import UnsafeInputError

# Data types of the standard library that training scripts leave in checkpoints.
HARMLESS: dict[str, frozenset[str]] = {
    module: frozenset(names.split())
    for module, names in {
        "_codecs": "encode",
        "argparse": "Namespace",
        "builtins": "bool bytearray bytes complex dict float frozenset int list object range set "
        "slice str tuple NoneType Ellipsis",
        "collections": "Counter OrderedDict defaultdict deque",
        "copyreg": "_reconstructor __newobj__",
        "datetime": "date datetime time timedelta timezone",
        "decimal": "Decimal",
        "enum": "Enum Flag IntEnum IntFlag StrEnum",
        "fractions": "Fraction",
        "functools": "partial",
        "pathlib": "Path PosixPath PurePath PurePosixPath PureWindowsPath WindowsPath",
        "types": "SimpleNamespace",
        "typing": "Any Dict List Optional Tuple Union",
        "uuid": "UUID SafeUUID",
        "zoneinfo": "ZoneInfo",
    }.items()
}
OTHER_NAMES = {"__builtin__": "builtins", "copy_reg": "copyreg", "pathlib._local": "pathlib"}

# Standard modules of other Python versions, and packages known to turn data into code.
CODE_ROOTS = frozenset(sys.stdlib_module_names).union(
    # from other Python versions
    ("Queue", "UserDict", "__builtin__", "asynchat", "asyncore", "cPickle", "cgi", "cgitb"),
    ("commands", "copy_reg", "crypt", "distutils", "exceptions", "httplib", "idlelib", "imp"),
    ("lib2to3", "nis", "nt", "pipes", "popen2", "posix", "smtpd", "telnetlib", "test", "urllib2"),
    # third party
    ("IPython", "_distutils_hack", "_pytest", "cloudpickle", "dill", "joblib", "pip"),
    ("pkg_resources", "py", "pytest", "setuptools"),
)
CODE_PREFIXES = (
    "numpy.distutils",
    "numpy.f2py",
    "numpy.lib.npyio",
    "numpy.testing",
    "pandas.io",
    "torch._dynamo",
    "torch._inductor",
    "torch.distributed.elastic",
    "torch.hub",
    "torch.jit",
    "torch.multiprocessing",
    "torch.package",
    "torch.testing",
    "torch.utils._config_module",
    "torch.utils.bottleneck",
    "torch.utils.collect_env",
    "torch.utils.cpp_extension",
)
CODE_NAMES = frozenset(
    (
        "numpy.load",
        "torch.load",
        "torch.serialization.load",
        "torch.storage._load_from_bytes",
        "torch.ops.load_library",
        "torch.classes.load_library",
        "torch.compile",
    )
)
MOST_LISTED = 20
# A container from a file may hold itself many times over: written out, it would never end.
BRIEF = reprlib.Repr()
BRIEF.maxlevel, BRIEF.maxstring, BRIEF.maxother = 4, 80, 80
BRIEF.maxlist = BRIEF.maxtuple = BRIEF.maxdict = 40


def means_code(module: str, name: str) -> bool:
    """Whether a pickle that names `module.name` can do more than describe data.

    Args:
      module: module part of the global, as written in the file.
      name: attribute part; a dotted one is looked up step by step by a real unpickler.

    Returns:
      True for every name of the standard library outside the harmless list, and for third-party
      code runners.
    """
    owner = OTHER_NAMES.get(module, module)
    first = name.split(".", 1)[0]
    if first in HARMLESS.get(owner, ()):
        return "." in name
    if owner.split(".", 1)[0] in CODE_ROOTS:
        return True
    full = f"{owner}.{name}"
    if full in CODE_NAMES or any(full.startswith(prefix + ".") for prefix in CODE_PREFIXES):
        return True
    return any(step in CODE_ROOTS for step in name.split(".")[:-1])


def show(text: object, limit: int = 80) -> str:
    """A short printable form of text from an untrusted file: quoted, escaped and cut."""
    full = BRIEF.repr(text) if isinstance(text, list | tuple | dict) else str(text)
    return ascii(full[:limit])[1:-1] + ("..." if len(full) > limit else "")


def listing(names: list[str]) -> str:
    """Names from an untrusted file, joined for a message, the tail counted instead of printed."""
    shown = ", ".join(show(name) for name in names[:MOST_LISTED])
    return shown + (f" and {len(names) - MOST_LISTED} more" if len(names) > MOST_LISTED else "")


def refuse_code(where: str, names: list[str]) -> None:
    """Raises on a file that names code.

    Args:
      where: the file, and the member in it, for the message.
      names: dotted names of the code, in file order; may be empty.

    Raises:
      UnsafeInputError: if there is any name, listing them.
    """
    if names:
        raise UnsafeInputError(
            f"{where} would run code when unpickled: it names {listing(names)}. Nothing was "
            "executed. Get the weights from a source you trust, best as .safetensors; if you wrote "
            'this file yourself, save only the weights: torch.save(model.state_dict(), "net.pth").'
        )
