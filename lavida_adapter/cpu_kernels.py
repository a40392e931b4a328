"""Products with packed weights and attention in float32 on a CPU with AVX-512: compiled when first needed.

docs/lavida.md, "Engine". A denoising step multiplies a few rows with every weight. torch's products spend up to half of
that time on bringing weights from memory into the order in which the processor multiplies. Here they are stored in that
order once: in panels of 32 outputs, a panel input by input. `torch.nn.functional.linear` and
`scaled_dot_product_attention` are the plain twins, and compute what these kernels do not.
"""

import copy
import hashlib
import os
import platform
import shutil
import subprocess
import tempfile
from functools import cache
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lavida_adapter.attention import has_avx512
from lavida_adapter.language_model import LanguageModel
from shirg import UserError

SOURCE = Path(__file__).with_suffix(".cpp")
PANEL = 32
"""Outputs of a panel, as in cpu_kernels.cpp."""
OLDEST_TORCH = (2, 10)
"""The first version with `torch::stable::parallel_for`."""
FLAGS = ("-std=c++20", "-O3", "-fno-math-errno", "-fno-trapping-math", "-ffp-contract=fast", "-shared", "-fPIC")
INSTRUCTIONS = ("-march=x86-64-v4", "-mprefer-vector-width=512")
"""A vector of 16 numbers is one register of AVX-512; with narrower ones the kernels are far slower than torch's."""


def compiler() -> str:
    """The C++ compiler that torch would call, too.

    Raises:
        UserError: when it is not installed.
    """
    name = os.environ.get("CXX", "g++")
    if shutil.which(name) is None:
        raise UserError(
            f"decode.engine=compile needs a C++ compiler on a CPU, and there is no {name!r} on the path: install one, "
            "name another in CXX, or use decode.engine=eager"
        )
    return name


@cache
def load() -> None:
    """Registers the kernels as torch.ops.shirg_cpu; compiles them where no process of this user has done so before.

    Raises:
        UserError: without a C++ compiler, with one that fails, and for a torch that is too old.
    """
    found = tuple(int(part) for part in torch.__version__.split(".")[:2])
    if found < OLDEST_TORCH:
        raise UserError(
            f"decode.engine=compile on a CPU needs torch {'.'.join(map(str, OLDEST_TORCH))} for weights in float32, "
            f"and this is {torch.__version__}: install a later one, or use decode.engine=eager"
        )
    torch.ops.load_library(_built())
    torch.library.register_fake("shirg_cpu::packed_linear", _shape_of_linear)
    torch.library.register_fake("shirg_cpu::attend", _shape_of_attend)


def _built() -> Path:
    """The compiled library, in torch's folder for extensions, under a name that says what it was made from."""
    from torch.utils.cpp_extension import get_default_build_root, include_paths, library_paths

    command = [compiler(), *FLAGS, *INSTRUCTIONS, f"-DTORCH_TARGET_VERSION={_target_version()}"]
    command += [f"-I{path}" for path in include_paths()] + [f"-L{path}" for path in library_paths()]
    made_from = f"{command} {torch.__version__} {platform.machine()} {SOURCE.read_text()}"
    folder = Path(os.environ.get("TORCH_EXTENSIONS_DIR", get_default_build_root())) / "shirg_cpu"
    library = folder / f"{hashlib.sha256(made_from.encode()).hexdigest()[:16]}.so"
    if library.exists():
        return library
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=folder) as own:
            made = Path(own) / library.name
            _compile([*command, str(SOURCE), "-o", str(made), "-ltorch_cpu"])
            made.replace(library)  # at once, so that no other process loads half a file
    except OSError as error:
        raise UserError(
            f"decode.engine=compile keeps its kernels in {folder}, which cannot be written ({error.strerror}): name "
            "another folder in TORCH_EXTENSIONS_DIR, or use decode.engine=eager"
        ) from error
    return library


def _compile(command: list[str]) -> None:
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode:
        last = (done.stderr.strip().splitlines() or ["no message"])[-1]
        raise UserError(
            f"decode.engine=compile: {command[0]} cannot compile {SOURCE.name} ({last}): name another compiler in CXX, "
            "or use decode.engine=eager"
        )


def _target_version() -> str:
    """The oldest torch that the library must work with, as torch's headers write it."""
    major, minor = OLDEST_TORCH
    return f"0x{major:02x}{minor:02x}000000000000"


def _shape_of_linear(x: Tensor, weight: Tensor, bias: Tensor | None, n_out: int) -> Tensor:
    return x.new_empty(x.shape[0], n_out)


def _shape_of_attend(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    batch, heads, n_queries, width = q.shape
    return q.new_empty(batch, n_queries, heads, width)


def pack(weight: Tensor) -> Tensor:
    """Weights [N, K] as panels [ceil(N / 32), K, 32], filled up with zeros."""
    padded = F.pad(weight, (0, 0, 0, -len(weight) % PANEL))
    return padded.unflatten(0, (-1, PANEL)).transpose(1, 2).contiguous()


class PackedLinear(nn.Module):
    """A linear layer in float32 with a packed copy of its weights."""

    def __init__(self, layer: nn.Linear) -> None:
        super().__init__()
        self.n_out, self.bias = layer.out_features, layer.bias
        self.register_buffer("panels", pack(layer.weight.detach()), persistent=False)

    def forward(self, x: Tensor) -> Tensor:
        rows: Tensor = torch.ops.shirg_cpu.packed_linear(x.flatten(0, -2), self.panels, self.bias, self.n_out)
        return rows.unflatten(0, x.shape[:-1])


@torch.inference_mode(False)
@torch.no_grad()
def packed_copy(lm: LanguageModel) -> LanguageModel:
    """The model with packed linear layers and the kernel's attention; everything else is shared with the given one."""
    load()
    packed = copy.deepcopy(lm, {id(t): t for t in (*lm.parameters(), *lm.buffers())})
    _pack_layers(packed)
    packed.backend = "cpp" if lm.backend == "sdpa" else lm.backend
    return packed


def _pack_layers(module: nn.Module) -> None:
    for name, child in list(module.named_children()):
        if isinstance(child, nn.Linear) and type(child).forward is nn.Linear.forward:
            setattr(module, name, PackedLinear(child))
        elif not hasattr(child, "base_layer"):  # a layer with an adapter that is not merged runs as it is
            _pack_layers(child)


def can_pack(lm: LanguageModel) -> bool:
    """Whether all weights are in float32 on a CPU with AVX-512; otherwise torch's own kernels are used."""
    return has_avx512() and all(p.dtype == torch.float32 and p.device.type == "cpu" for p in lm.parameters())


def state_of(lm: LanguageModel) -> tuple[object, ...]:
    """Changes with the modules of a model, where its weights lie, and in-place changes that autograd sees."""
    modules = tuple(id(module) for module in lm.modules())
    return modules + tuple((p.data_ptr(), 0 if p.is_inference() else p._version) for p in lm.parameters())
