"""The AOTInductor backend: a package that torch runs, in Python or C++, where tokcc is not installed."""

from __future__ import annotations

import json
import tempfile
import warnings
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy.typing as npt
import torch
from torch import fx
from torch.export import ExportedProgram, ModuleCallEntry, ModuleCallSignature
from torch.utils import _pytree as pytree

from tokcc.backends.arrays import to_array, to_tensor
from tokcc.backends.cxx import CXX_HELP, cxx_compiler, cxx_missing
from tokcc.backends.feeds import Feeds
from tokcc.errors import LoweringError, UsageError
from tokcc.ir.program import Program
from tokcc.lowering.aten import decompose, large_sizes

__all__ = ["AotiOptions", "AotiSession", "callable_by_name", "eager_runner", "lacking", "package"]

Array = npt.NDArray[Any]

_INPUTS = "tokcc.inputs"
_CAPABILITIES = ("DEFAULT", "AVX2", "AVX512")
"""What torch knows of x86, each with all that is before it."""


@dataclass(frozen=True)
class AotiOptions:
    """How packages are made.

    Attributes:
        device: ``cpu``; of ``cuda`` only what a machine with a GPU needs to make one.
        freezing: Pack the weights for the CPU's kernels: about twice as fast. They can no longer be replaced then.
        inductor: Further options of Inductor, such as ``{"max_autotune": True}``.
    """

    device: str = "cpu"
    freezing: bool = True
    inductor: Mapping[str, Any] = field(default_factory=dict)

    @classmethod
    def of(cls, device: str, settings: Mapping[str, Any]) -> AotiOptions:
        """Read what a user gave.

        Args:
            device: ``cpu`` or ``cuda``.
            settings: ``freezing``, and options of Inductor by name.

        Raises:
            UsageError: There is no such device or option.
        """
        if device not in ("cpu", "cuda"):
            raise UsageError(f"there is no device `{device}` to compile for", needed="cpu or cuda")
        rest = dict(settings)
        freezing = rest.pop("freezing", True)
        if not isinstance(freezing, bool):
            raise UsageError("`freezing` is on or off", needed="true or false", found=repr(freezing))
        known = _inductor_options() if rest else frozenset()
        for name in rest:
            if name not in known:
                raise UsageError(
                    f"Inductor has no option `{name}`",
                    needed="`freezing`, or a name of torch._inductor.config",
                    help="for instance `max_autotune=true`",
                )
        return cls(device, freezing, rest)

    def configuration(self) -> dict[str, Any]:
        """Return Inductor's options."""
        # Otherwise the number of threads of this process is compiled in.
        own: dict[str, Any] = {"freezing": self.freezing, "cpp.dynamic_threads": True}
        return {**own, **self.inductor}


def _inductor_options() -> frozenset[str]:
    from torch._inductor import config

    return frozenset(config.get_config_copy())


def package(
    program: Program, path: Path, example: Feeds, options: AotiOptions, metadata: Mapping[str, str] | None = None
) -> dict[str, str | int | float | bool]:
    """Compile a program for this machine's CPU and write the package.

    All that is made on the way lies beside the package until it is done.

    Args:
        program: The (reduced) program.
        path: Where the package goes, ending in ``.pt2``.
        example: Inputs by name; their sizes are hints where an axis is dynamic.
        options: How.
        metadata: Written into the package.

    Returns:
        What the package is made for: instruction set, versions, options.

    Raises:
        LoweringError: There is no C++ compiler, or the program cannot be compiled.
    """
    compiler = cxx_compiler()
    if compiler is None:
        raise LoweringError(
            "the aoti backend needs a C++ compiler",
            needed="g++ or clang++ on the PATH (to compile, not to run what was compiled)",
            found=cxx_missing(),
            help=CXX_HELP,
        )
    exported = callable_by_name(program, decompose(program), example)
    names = [program.public_name(node) for node in program.user_inputs]
    configuration = {
        **options.configuration(),
        "cpp.cxx": (None, compiler),
        "aot_inductor.package": True,
        "aot_inductor.metadata": {**(metadata or {}), _INPUTS: json.dumps(names)},
    }
    with tempfile.TemporaryDirectory(dir=path.parent, prefix=".aoti-") as folder:
        made = Path(folder).resolve() / path.name
        configuration["aot_inductor.output_path"] = str(made.parent / "build")
        _compile(exported, made, configuration)
        made.replace(path)
    found = AotiSession(path).metadata
    return {
        "device": "cpu",
        "isa": found.get("AOTI_CPU_ISA", "unknown"),
        "machine": found.get("AOTI_MACHINE", "unknown"),
        "platform": found.get("AOTI_PLATFORM", "unknown"),
        "torch": torch.__version__,
        "freezing": options.freezing,
        **{name: value for name, value in options.inductor.items() if isinstance(value, str | int | float | bool)},
    }


def _compile(exported: ExportedProgram, path: Path, configuration: dict[str, Any]) -> None:
    from torch._inductor import aot_compile
    from torch._inductor.package.package import package_aoti

    args, kwargs = exported.example_inputs
    with warnings.catch_warnings(), torch.no_grad(), large_sizes(exported):
        warnings.simplefilter("ignore")  # the compiler's own, of what it does to the program
        try:
            module: Any = exported.module(check_guards=False)
            _copy_shared_constants(module)
            files: Any = aot_compile(module, args, kwargs, options=configuration)
            package_aoti(str(path), files)
        except OSError:
            raise
        except Exception as error:  # Inductor raises whatever a stage of it does
            text = [line for line in str(error).splitlines() if line.strip()]
            raise LoweringError(
                "AOTInductor does not compile the program",
                found=f"{type(error).__name__}: {' '.join(text[:3])[:400]}",
                help="--backend onnx and --backend pt2 need no compiler",
            ) from error


def _copy_shared_constants(module: fx.GraphModule) -> None:
    """Give every use of a constant a copy: Inductor deletes one with the first use that it folds away."""
    for node in module.graph.find_nodes(op="get_attr"):
        value: Any = getattr(module, str(node.target), None)
        if not isinstance(value, torch.Tensor) or isinstance(value, torch.nn.Parameter):
            continue
        for number, user in enumerate(list(node.users)[1:]):
            name = f"{node.target}_use_{number}"
            module.register_buffer(name, value.clone(), persistent=False)
            with module.graph.inserting_before(user):
                copied = module.graph.get_attr(name)
            copied.meta = dict(node.meta)
            user.replace_input_with(node, copied)
    module.recompile()


def callable_by_name(program: Program, exported: ExportedProgram, example: Feeds) -> ExportedProgram:
    """Return a program that takes its inputs by keyword and gives its outputs by name, whatever the model's classes.

    Names that are no Python names have ``_`` for what is not allowed in one.

    Args:
        program: Whose names these are.
        exported: The same program in other operations.
        example: Inputs by name.
    """
    inputs = program.user_inputs
    for node in inputs:
        fake = node.meta.get("val")
        if not isinstance(fake, torch.Tensor):
            raise LoweringError(
                "the aoti backend takes tensors only", node=f"input `{node.name}`", found=type(fake).__name__
            )
        if not fake.is_contiguous():
            raise LoweringError(
                "the aoti backend fixes how inputs lie in memory",
                node=f"input `{node.name}`",
                needed="a contiguous example",
                found=f"strides {tuple(fake.stride())}",
                help="export the model with `.contiguous()` examples",
            )
    names = {_keyword(program.public_name(node), node.name): program.public_name(node) for node in inputs}
    entry = ModuleCallSignature(
        inputs=[],
        outputs=[],
        in_spec=pytree.tree_structure(((), dict.fromkeys(names, 0))),
        out_spec=pytree.tree_structure(dict.fromkeys(program.output_names, 0)),
    )
    return ExportedProgram(
        root=exported.graph_module,
        graph=exported.graph,
        graph_signature=exported.graph_signature,
        state_dict=exported.state_dict,
        range_constraints=exported.range_constraints,
        module_call_graph=[ModuleCallEntry(fqn="", signature=entry)],
        example_inputs=((), {keyword: example[name].contiguous() for keyword, name in names.items()}),
        constants=exported.constants,
        verifiers=list(exported.verifiers),
    )


def _keyword(public: str, otherwise: str) -> str:
    return public if public.isidentifier() else otherwise


def eager_runner(program: Program, exported: ExportedProgram) -> Callable[[Mapping[str, Array]], dict[str, Array]]:
    """Return what runs a program from :func:`callable_by_name` operation by operation, inputs and outputs by name.

    Args:
        program: Whose names these are.
        exported: The program that is called by keyword.
    """
    module = exported.module(check_guards=False)
    keywords = list(exported.example_inputs[1])
    names = [program.public_name(node) for node in program.user_inputs]

    def run(feeds: Mapping[str, Array]) -> dict[str, Array]:
        given = {keyword: to_tensor(feeds[name]) for keyword, name in zip(keywords, names, strict=True)}
        with torch.no_grad():
            found = module(**given)
        return {name: to_array(value) for name, value in found.items()}

    return run


class AotiSession:
    """A package on the CPU.

    What it is fed must have the dtypes, and the shapes or ranges of shapes, that it was compiled for: nothing checks
    that here (see :func:`tokcc.backends.contract.check_feeds`), unless ``AOTI_RUNTIME_CHECK_INPUTS=1`` is set.

    Args:
        path: The package.
        threads: Threads inside an operation; 0 = torch's own number.

    Raises:
        LoweringError: torch does not load it.
    """

    def __init__(self, path: Path, *, threads: int = 0) -> None:
        from torch._inductor import aoti_load_package

        self._threads = threads
        try:
            self._model: Any = aoti_load_package(str(path.resolve()))
            self.metadata: dict[str, str] = self._model.get_metadata()
        except RuntimeError as error:
            raise LoweringError(
                "torch does not load the aoti package",
                found=" ".join(str(error).split())[:300],
                help="packages run with the minor version of torch, the system and the CPU that they were compiled for",
            ) from error
        ins, outs = (pytree.treespec_loads(spec) for spec in self._model.loader.get_call_spec())
        self._keywords: list[str] = list(ins.child(1).context)
        self.inputs: list[str] = json.loads(self.metadata.get(_INPUTS, "null")) or self._keywords
        self.outputs: list[str] = list(outs.context)

    def run(self, feeds: Mapping[str, Array]) -> dict[str, Array]:
        """Run once.

        Raises:
            LoweringError: torch stops: a size is out of what the package was compiled for.
        """
        given = {keyword: to_tensor(feeds[name]) for keyword, name in zip(self._keywords, self.inputs, strict=True)}
        try:
            with torch.inference_mode(), _threads(self._threads):
                found = self._model(**given)
        except RuntimeError as error:
            raise LoweringError(
                "the aoti package does not run",
                found=" ".join(str(error).split())[:300],
                help="sizes and dtypes must be those in `manifest.json`; where they are, compile with --backend onnx",
            ) from error
        return {name: to_array(found[name]) for name in self.outputs}


@contextmanager
def _threads(count: int) -> Iterator[None]:
    before = torch.get_num_threads()
    if count in (0, before):
        yield
        return
    torch.set_num_threads(count)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def lacking(isa: str) -> str | None:
    """Return what this machine's CPU lacks of the instruction sets that a package was compiled for, or None."""
    wanted = max((i for i, name in enumerate(_CAPABILITIES) if name in isa.upper().split()), default=0)
    have = torch.backends.cpu.get_cpu_capability()
    if wanted and have in _CAPABILITIES and _CAPABILITIES.index(have) < wanted:
        return _CAPABILITIES[wanted]
    return None
