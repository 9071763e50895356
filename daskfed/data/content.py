"""What a function and its arguments are, as a token that is the same in every process, and another once they change.

Of functions that a user wrote counts what decides what they return: the instructions, with the constants that they
load, default values, what a closure holds, and the global values that they use, down to other functions and classes;
not where they stand, their names, docstrings, annotations or comments. What comes from an installed package, or from
Python, counts by its name and the version of that package. Values count by type and content: plain ones and containers
as they are, those that Dask knows how to tokenize by Dask's token, others by what ``pickle`` would make them from.

What cannot be told for sure is a :class:`NotCacheable`: a lock, a generator, an open file.
"""

from __future__ import annotations

import copyreg
import dis
import functools
import hashlib
import importlib.util
import site
import sys
import sysconfig
import types
from collections.abc import Callable, Iterable, Iterator, Mapping
from importlib import metadata
from pathlib import Path
from typing import Any, TypeAlias

from dask.base import is_dask_collection, normalize_token
from dask.tokenize import tokenize
from toolz import identity

from daskfed.errors import NotCacheable

Digest: TypeAlias = bytes

PYTHON = f"{sys.version_info.major}.{sys.version_info.minor}"
PLAIN = frozenset({bool, int, float, complex, str, type(None), type(...), type(NotImplemented), range})
SCOPELESS = frozenset({types.FunctionType, types.BuiltinFunctionType, types.ModuleType, type})
ATTRIBUTES = frozenset({"LOAD_ATTR", "LOAD_METHOD"})
GLOBALS = frozenset({"LOAD_GLOBAL", "LOAD_NAME", "LOAD_FROM_DICT_OR_GLOBALS"})
IGNORED = frozenset({  # of a class: what Python adds, and what says nothing about what it does
    "__dict__", "__weakref__", "__module__", "__qualname__", "__doc__", "__annotations__", "__annotate__",
    "__annotate_func__", "__annotations_cache__", "__firstlineno__", "__static_attributes__", "__orig_bases__",
    "__parameters__", "__match_args__", "__dataclass_fields__", "__dataclass_params__", "_abc_impl",
})  # fmt: skip
HINT = (
    "pass what it is made from instead, register how it is tokenized with dask.base.normalize_token, "
    "or leave out cache=True"
)


class Walk:
    """One look at some things; of what it has seen it knows the digest, also where things hold each other.

    ``other`` is asked first for whatever is no plain value: it returns a digest, or None for what it does not know.
    """

    def __init__(self, other: Callable[[Any], Digest | None] = lambda value: None) -> None:
        self.scope = 0  # in another one, what ``other`` is asked about may mean something else
        self._other = other
        self._known: dict[Any, tuple[Any, Digest]] = {}  # by id; the thing itself keeps its id from being used again
        self._depth = 0

    def of(self, value: Any) -> Digest:
        """Return the digest of a value; raises NotCacheable."""
        kind = type(value)
        if kind in PLAIN:
            return digest(kind.__name__, hex(value) if kind is int else repr(value))
        if kind is bytes:
            return digest("bytes", value)
        name = id(value) if kind in SCOPELESS else (id(value), self.scope)
        if (known := self._known.get(name)) is not None:
            return known[1]
        self._known[name] = value, digest("within", str(self._depth))  # for what leads back to it
        self._depth += 1
        found = self._other(value)
        if found is None:
            found = self._of(value, kind)
        self._depth -= 1
        self._known[name] = value, found
        return found

    def _of(self, value: Any, kind: type) -> Digest:
        for kinds, method in _METHODS:
            if kind in kinds:
                return method(self, value)
        if isinstance(value, type):
            return self._class(value)
        if kind.__module__ == "numpy" and getattr(getattr(value, "dtype", None), "hasobject", False):
            return digest("objects", repr(value.shape), self.of(str(value.dtype)), self.of(value.tolist()))
        if is_dask_collection(value):
            raise NotCacheable(f"{_shown(value)} is not computed yet: compute or persist it with cache=True")
        if getattr(kind, "__dask_tokenize__", None) or _is_known_to_dask(kind):
            return digest("dask", self._kind(value), _dask_token(value))
        return self._reduced(value)

    def call(self, function: Any, args: Iterable[Any], kwargs: Mapping[str, Any]) -> Digest:
        """Return the digest of a call; a NotCacheable that it raises names the function or the argument."""
        called = self.part(_called(function), function)
        return self.call_of(called, function, args, kwargs)

    def call_of(self, called: Digest, function: Any, args: Iterable[Any], kwargs: Mapping[str, Any]) -> Digest:
        """Return the digest of a call of a function whose digest is known."""
        plain = [self.part(f"argument {n} of {_called(function)}", value) for n, value in enumerate(args, 1)]
        named = [(name, self.part(f"{name}= of {_called(function)}", kwargs[name])) for name in sorted(kwargs)]
        return digest("call", called, digest("all", *plain), digest("named", *(digest(*pair) for pair in named)))

    def part(self, what: str, value: Any) -> Digest:
        """Return the digest of a value; a NotCacheable that it raises begins with ``what`` it is."""
        try:
            return self.of(value)
        except NotCacheable as exc:
            raise NotCacheable(f"{what}: {exc}") from None
        except RecursionError:
            raise NotCacheable(f"{what}: it is nested too deeply; {HINT}") from None

    def _kind(self, value: Any) -> Digest:
        """Return the digest of the type of a value that has a token; what is installed counts if it can be called."""
        kind = type(value)
        return self.of(kind) if callable(value) or _installed(kind) is None else digest(_named(kind))

    def all(self, values: Iterable[Any]) -> Digest:
        """Return the digest of several values in order."""
        return digest("all", *map(self.of, values))

    def named(self, values: Mapping[Any, Any]) -> Digest:
        """Return the digest of values with names, whose order does not matter."""
        return digest("named", *sorted(digest("item", self.of(name), self.of(value)) for name, value in values.items()))

    # -- containers and objects ----------------------------------------------------------------------------------------

    def _sequence(self, value: Any) -> Digest:
        return digest(type(value).__name__, self.all(value))

    def _slice(self, value: slice) -> Digest:
        return digest("slice", self.all((value.start, value.stop, value.step)))

    def _set(self, value: Any) -> Digest:
        return digest(type(value).__name__, *sorted(map(self.of, value)))

    def _mapping(self, value: Any) -> Digest:
        return digest("dict", self.named(value))

    def _reduced(self, value: Any) -> Digest:
        """Return the digest of what an object is made from, which is what pickle keeps of it."""
        try:
            reduce = copyreg.dispatch_table.get(type(value))
            parts = value.__reduce_ex__(4) if reduce is None else reduce(value)
        except Exception as exc:
            raise NotCacheable(f"{_shown(value)} cannot be told from others ({exc}): {HINT}") from None
        if isinstance(parts, str):
            module = getattr(value, "__module__", None) or type(value).__module__
            return digest("global", module, parts, _module(module))
        function, args, state, items, pairs = (*parts, None, None, None)[:5]
        listed = self.all(items) if items is not None else b""
        paired = digest("pairs", *(self.all(pair) for pair in pairs)) if pairs is not None else b""
        return digest("object", self.of(function), self.all(args), self.of(state or None), listed, paired)

    # -- functions and classes -----------------------------------------------------------------------------------------

    def _function(self, function: types.FunctionType) -> Digest:
        if (installed := _installed(function)) is not None:
            return installed
        cells = (self._cell(cell) for cell in function.__closure__ or ())
        own = {name: value for name, value in vars(function).items() if name != "__wrapped__"}
        defaults = self.all((function.__defaults__, function.__kwdefaults__, own))
        used = self._names_used(function)
        return digest("function", _instructions(function.__code__), defaults, digest("closure", *cells), used)

    def _cell(self, cell: types.CellType) -> Digest:
        try:
            return self.of(cell.cell_contents)
        except ValueError:
            return digest("empty cell")

    def _names_used(self, function: types.FunctionType) -> Digest:
        """Return the digest of the global values that a function uses, and of what it imports."""
        found = []
        for name, attributes in sorted(_globals_used(function.__code__)):
            if name in function.__globals__:
                try:
                    value = self._global(function.__globals__[name], attributes)
                except NotCacheable as exc:
                    raise NotCacheable(f"the function {_called(function)} uses {name}: {exc}") from None
            else:
                value = digest("builtin")
            found.append(digest(name, ".".join(attributes), value))
        package = function.__globals__.get("__package__") or ""
        for name in _modules_imported(function.__code__, package):
            found.append(digest("import", name, _module(name)))
        return digest("uses", *found)

    def _global(self, value: Any, attributes: tuple[str, ...]) -> Digest:
        """Return the digest of what a function takes from a global value: of modules of the user, attributes only."""
        for name in attributes:
            if not isinstance(value, types.ModuleType) or _version(value.__name__) is not None:
                break
            if not hasattr(value, name):
                return _module(value.__name__)
            value = getattr(value, name)
        return self.of(value)

    def _builtin(self, function: Any) -> Digest:
        owner = getattr(function, "__self__", None)
        if owner is not None and not isinstance(owner, types.ModuleType):
            return digest("method", function.__name__, self.of(owner))
        module = function.__module__ or "builtins"
        return digest("installed", module, function.__qualname__, _module(module))

    def _method(self, method: types.MethodType) -> Digest:
        return digest("method", self.of(method.__func__), self.of(method.__self__))

    def _partial(self, partial: functools.partial[Any]) -> Digest:
        return digest("partial", self.of(partial.func), self.all(partial.args), self.of(partial.keywords))

    def _wrapper(self, wrapper: Any) -> Digest:
        return digest("cached", self.of(wrapper.__wrapped__))

    def _descriptor(self, descriptor: Any) -> Digest:
        return digest("descriptor", type(descriptor).__name__, descriptor.__name__, _named(descriptor.__objclass__))

    def _wrapped(self, method: Any) -> Digest:
        return digest(type(method).__name__, self.of(method.__func__))

    def _property(self, value: property) -> Digest:
        return digest("property", self.all((value.fget, value.fset, value.fdel)))

    def _module(self, module: types.ModuleType) -> Digest:
        return digest("module", module.__name__, _module(module.__name__))

    def _class(self, kind: type) -> Digest:
        if (installed := _installed(kind)) is not None:
            return installed
        own = {name: value for name, value in vars(kind).items() if name not in IGNORED}
        slots = [name for name, value in own.items() if isinstance(value, types.MemberDescriptorType)]
        rest = {name: value for name, value in own.items() if name not in slots}
        return digest(
            "class", kind.__name__, self.of(type(kind)), self.all(kind.__bases__), repr(sorted(slots)), self.named(rest)
        )


_METHODS: tuple[tuple[frozenset[type], Callable[[Walk, Any], Digest]], ...] = (
    (frozenset({tuple, list}), Walk._sequence),
    (frozenset({slice}), Walk._slice),
    (frozenset({set, frozenset}), Walk._set),
    (frozenset({dict, types.MappingProxyType}), Walk._mapping),
    (frozenset({types.FunctionType}), Walk._function),
    (frozenset({types.BuiltinFunctionType, types.MethodWrapperType}), Walk._builtin),
    (frozenset({types.MethodType}), Walk._method),
    (frozenset({functools.partial}), Walk._partial),
    (frozenset({functools._lru_cache_wrapper}), Walk._wrapper),
    (frozenset({staticmethod, classmethod}), Walk._wrapped),
    (frozenset({property}), Walk._property),
    (frozenset({types.ModuleType}), Walk._module),
    (
        frozenset({
            types.MethodDescriptorType, types.WrapperDescriptorType, types.ClassMethodDescriptorType,
            types.GetSetDescriptorType, types.MemberDescriptorType,
        }),
        Walk._descriptor,
    ),
)  # fmt: skip


def digest(*parts: str | bytes) -> Digest:
    """Return a digest of parts, each with its length, so that no two lists of them have the same."""
    found = hashlib.sha256()
    for part in parts:
        data = part.encode(errors="surrogatepass") if isinstance(part, str) else part
        found.update(b"%d:" % len(data))
        found.update(data)
    return found.digest()


# -- code ------------------------------------------------------------------------------------------------------------


@functools.lru_cache(4096)
def _instructions(code: types.CodeType) -> Digest:
    """Return the digest of what a code object does: of its constants, only those that it loads."""
    parts = [digest(each.opname, _argument(each)) for each in dis.get_instructions(code)]
    counts = code.co_argcount, code.co_posonlyargcount, code.co_kwonlyargcount, code.co_flags
    names = code.co_varnames[: code.co_argcount + code.co_kwonlyargcount]
    caught = getattr(code, "co_exceptiontable", b"")
    return digest("code", repr(counts), repr(names), repr(code.co_freevars), caught, *parts)


def _argument(instruction: dis.Instruction) -> Digest:
    if instruction.opcode in dis.hasconst:
        return _constant(instruction.argval)
    return digest(repr(instruction.argval))


def _constant(value: Any) -> Digest:
    if isinstance(value, types.CodeType):
        return _instructions(value)
    if isinstance(value, tuple):
        return digest("tuple", *map(_constant, value))
    if isinstance(value, frozenset):
        return digest("frozenset", *sorted(map(_constant, value)))
    return digest(type(value).__name__, hex(value) if type(value) is int else repr(value))


def _codes(code: types.CodeType) -> Iterator[types.CodeType]:
    yield code
    for constant in code.co_consts:
        if isinstance(constant, types.CodeType):
            yield from _codes(constant)


@functools.lru_cache(4096)
def _globals_used(code: types.CodeType) -> frozenset[tuple[str, tuple[str, ...]]]:
    """Return the global names that code uses, each with the attributes that are taken of it one after the other."""
    found: set[tuple[str, tuple[str, ...]]] = set()
    for each in _codes(code):
        name: str | None = None
        attributes: list[str] = []
        for instruction in (*dis.get_instructions(each), None):
            if name is not None and instruction is not None and instruction.opname in ATTRIBUTES:
                attributes.append(instruction.argval)
                continue
            if name is not None:
                found.add((name, tuple(attributes)))
            name, attributes = None, []
            if instruction is not None and instruction.opname in GLOBALS:
                name = instruction.argval
    return frozenset(found)


@functools.lru_cache(4096)
def _imported(code: types.CodeType) -> frozenset[tuple[str, int, tuple[str, ...]]]:
    """Return the modules that code imports when it runs: name, level of a relative import, and what is taken of it."""
    found = set()
    for each in _codes(code):
        instructions = list(dis.get_instructions(each))
        for place, instruction in enumerate(instructions):
            if instruction.opname == "IMPORT_NAME":  # before it are loaded the level, and the names
                level, names = instructions[place - 2].argval, instructions[place - 1].argval
                found.add((instruction.argval, level if isinstance(level, int) else 0, names or ()))
    return frozenset(found)


def _modules_imported(code: types.CodeType, package: str) -> Iterator[str]:
    """Yield the names of modules that code in a package imports when it runs."""
    for name, level, names in sorted(_imported(code)):
        full = importlib.util.resolve_name("." * level + name, package) if level and package else name
        yield full
        yield from (f"{full}.{each}" for each in names if _version(full) is None and _file(f"{full}.{each}"))


# -- where things come from --------------------------------------------------------------------------------------------


def _installed(thing: Any) -> Digest | None:
    """Return the digest of a function or class that an installed package has under its name; None for others."""
    module, name = getattr(thing, "__module__", None), thing.__qualname__
    if not module or module == "__main__" or (version := _version(module)) is None:
        return None
    found: Any = sys.modules.get(module)
    for part in name.split("."):
        found = getattr(found, part, None)
    return digest("installed", module, name, version) if found is thing else None


def _version(module: str) -> str | None:
    """Return the version of the package that a module is installed with; None for a module of the user."""
    top = module.partition(".")[0]
    if top in sys.stdlib_module_names and top != "__main__":
        return f"Python {PYTHON}"
    file = next(filter(None, map(_file, (top, module))), None)
    if file is None or not any(Path(file).is_relative_to(folder) for folder in _site_folders()):
        return None
    return _version_of_package(top)


@functools.cache
def _version_of_package(top: str) -> str | None:
    try:
        return metadata.version(top)
    except metadata.PackageNotFoundError:
        names = metadata.packages_distributions().get(top, ())
    return ", ".join(f"{name} {metadata.version(name)}" for name in sorted(set(names))) or None


@functools.cache
def _site_folders() -> tuple[str, ...]:
    paths = sysconfig.get_paths()
    return tuple({paths["purelib"], paths["platlib"], *site.getsitepackages(), site.getusersitepackages()})


def _file(module: str) -> str | None:
    """Return the file that a module is, or would be, imported from."""
    try:
        spec = importlib.util.find_spec(module)
    except Exception:  # it imports the package that the module is in
        return None
    return spec.origin if spec is not None and spec.has_location else None


def _module(name: str) -> Digest:
    """Return the digest of a module: its version where it is installed, else its file and those that it imports."""
    if (version := _version(name)) is not None:
        return digest("version", version)
    files: dict[str, bytes] = {}
    stack = [name]
    while stack:
        name = stack.pop()
        file = None if name in files or _version(name) is not None else _file(name)
        if file is None or not Path(file).is_file():
            continue
        files[name] = Path(file).read_bytes()
        if file.endswith(".py"):
            package = name if Path(file).stem == "__init__" else name.rpartition(".")[0]
            stack += _modules_imported(_compiled(files[name], file), package)
    return digest("files", *(digest(each, files[each]) for each in sorted(files)))


@functools.lru_cache(256)
def _compiled(source: bytes, file: str) -> types.CodeType:
    return compile(source, file, "exec", dont_inherit=True)


# -- Dask --------------------------------------------------------------------------------------------------------------


def _is_known_to_dask(kind: type) -> bool:
    """Whether somebody has told Dask how values of a type are tokenized; not what Dask does with containers."""
    function = normalize_token.dispatch(kind)
    own = function.__module__ == tokenize.__module__ and "<locals>" not in function.__qualname__
    return function is not identity and not own


def _dask_token(value: Any) -> str:
    try:
        return str(tokenize(value, ensure_deterministic=True))
    except Exception as exc:
        raise NotCacheable(f"{_shown(value)} has no token that is always the same ({exc}): {HINT}") from None


def _named(kind: type) -> str:
    return f"{kind.__module__}.{kind.__qualname__}"


def _called(function: Any) -> str:
    return str(getattr(function, "__qualname__", function))


def _shown(value: Any) -> str:
    return f"a value of type {_named(type(value))}"
