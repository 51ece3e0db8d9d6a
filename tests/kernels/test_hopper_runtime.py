"""The runtime of the CUDA C++ kernels: compiling with NVRTC, the cache on disk, loading and launching.

In: small kernels in a folder of their own. Nothing here needs a GPU but the tests marked so: a driver written in C with
NVIDIA's cuda.h records what would be launched. Only the tests of NVRTC itself need a torch with CUDA.
"""

from __future__ import annotations

import ctypes
import logging
import subprocess
import sys
import sysconfig
import threading
from pathlib import Path

import pytest
import torch

from sagecompile import files
from sagecompile.errors import UnsupportedError
from sagecompile.kernels.hopper import runtime

PROBE = r"""
#include "scale.cuh"
struct Parameters { float* x; int count; };
extern "C" __global__ void probe(const __grid_constant__ Parameters p) {
    extern __shared__ float staged[];
    asm volatile("griddepcontrol.wait;" ::: "memory");
    int i = blockIdx.x * blockDim.x + threadIdx.x;
    staged[threadIdx.x] = i < p.count ? p.x[i] : 0.0f;
    __syncthreads();
    if (i < p.count) p.x[i] = scaled(staged[threadIdx.x], FACTOR);
    asm volatile("griddepcontrol.launch_dependents;");
}
"""
HEADER = "inline float scaled(float x, int factor) { return factor * x; }\n"
TWICE = (("FACTOR", 2),)


class Parameters(ctypes.Structure):
    """Of PROBE."""

    _fields_ = (("x", ctypes.c_void_p), ("count", ctypes.c_int))


@pytest.fixture(autouse=True)
def folder(tmp_path, monkeypatch) -> Path:
    """The kernels' folder with probe.cu, and an empty cache."""
    sources = tmp_path / "kernels"
    sources.mkdir()
    (sources / "probe.cu").write_text(PROBE)
    (sources / "scale.cuh").write_text(HEADER)
    monkeypatch.setattr(runtime, "FOLDER", sources)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    runtime.kernel.cache_clear()
    monkeypatch.setattr(runtime, "_compiling", {})
    files.warn_once.cache_clear()
    return sources


@pytest.fixture
def nvrtc() -> None:
    try:
        runtime._nvrtc()
    except UnsupportedError as error:
        pytest.skip(f"needs NVRTC: {error}")


@pytest.fixture
def compiled(monkeypatch) -> list[list[str]]:
    """The options of each compilation, by a compiler that gives back what it was given."""
    calls = []

    def compile(source, text, headers, options):
        calls.append(options)
        return repr((source, text, headers, options)).encode()

    monkeypatch.setattr(runtime, "_compile", compile)
    monkeypatch.setattr(runtime, "_version", lambda: (13, 0))
    return calls


# The cache on disk.


def test_second_time_is_from_disk(compiled):
    assert runtime.compile_cubin("probe.cu", TWICE) == runtime.compile_cubin("probe.cu", TWICE)
    assert len(compiled) == 1


@pytest.mark.parametrize("change", ["source", "header", "new header", "define", "version", "options"])
def test_every_input_is_in_the_key(compiled, folder, monkeypatch, change):
    runtime.compile_cubin("probe.cu", TWICE)
    if change == "source":
        (folder / "probe.cu").write_text(PROBE + "\n")
    elif change in ("header", "new header"):
        (folder / ("scale.cuh" if change == "header" else "other.cuh")).write_text(HEADER + "\n")
    elif change == "version":
        monkeypatch.setattr(runtime, "_version", lambda: (13, 1))
    elif change == "options":
        monkeypatch.setattr(runtime, "OPTIONS", (*runtime.OPTIONS, "--use_fast_math"))
    runtime.compile_cubin("probe.cu", (("FACTOR", 3),) if change == "define" else TWICE)
    assert len(compiled) == 2


def test_defines_become_options(compiled):
    runtime.compile_cubin("probe.cu", (("FACTOR", 2), ("CAUSAL", True), ("BIAS", -1)))
    assert compiled[0] == [*runtime.OPTIONS, "-DFACTOR=2", "-DCAUSAL=1", "-DBIAS=-1"]


@pytest.mark.parametrize("damage", ["empty", "short", "changed"])
def test_damaged_file_is_compiled_again(compiled, tmp_path, damage):
    whole = runtime.compile_cubin("probe.cu", TWICE)
    (kept,) = (tmp_path / "cache" / "sagecompile" / "cubins").glob("*.cubin")
    stored = kept.read_bytes()
    assert stored.startswith(whole)
    kept.write_bytes({"empty": b"", "short": stored[:-1], "changed": b"?" + stored[1:]}[damage])
    assert runtime.compile_cubin("probe.cu", TWICE) == whole and len(compiled) == 2
    assert kept.read_bytes() == stored


@pytest.mark.parametrize("obstacle", ["no folder", "full"])
def test_works_without_a_cache(compiled, tmp_path, monkeypatch, caplog, obstacle):
    place = tmp_path / "cache" / "sagecompile" / "cubins"
    if obstacle == "no folder":  # a file in its place: nothing can be written below it, not even by root
        (tmp_path / "cache").write_text("")
    else:
        write = files.write

        def full(file, content):
            if file.parent == place:
                raise OSError(28, "No space left on device")
            write(file, content)

        monkeypatch.setattr(files, "write", full)
    with caplog.at_level(logging.WARNING, "sagecompile"):
        for count in (1, 2):
            assert b"probe.cu" in runtime.compile_cubin("probe.cu", TWICE)
            assert len(compiled) == count
    (record,) = caplog.records
    assert "cannot be kept" in record.message and not list(place.glob("*.cubin"))


def test_one_that_others_could_have_written_is_not_loaded(compiled, tmp_path):
    runtime.compile_cubin("probe.cu", TWICE)
    (tmp_path / "cache" / "sagecompile" / "cubins").chmod(0o777)
    with pytest.raises(UnsupportedError, match=r"can be written to by others \(mode 0777\)"):
        runtime.compile_cubin("probe.cu", TWICE)


def test_a_kernel_that_does_not_exist_is_ours_to_mend(compiled):
    with pytest.raises(FileNotFoundError):
        runtime.compile_cubin("absent.cu", ())


# NVRTC, which needs no GPU.


def test_compiles_and_logs_registers(nvrtc, caplog):
    with caplog.at_level(logging.DEBUG, "sagecompile"):
        cubin = runtime.compile_cubin("probe.cu", TWICE)
    assert cubin.startswith(b"\x7fELF") and b"probe" in cubin
    assert "0 bytes spill stores" in caplog.text and "registers" in caplog.text
    assert runtime.compile_cubin("probe.cu", TWICE) == cubin


def test_defines_and_headers_reach_the_code(nvrtc):
    assert runtime.compile_cubin("probe.cu", TWICE) != runtime.compile_cubin("probe.cu", (("FACTOR", 3),))


@pytest.mark.parametrize(
    ("source", "message"),
    [
        (PROBE, 'cannot compile probe.cu: probe.cu(10): error: identifier "FACTOR" is undefined'),
        (
            "#include <cuda_bf16.h>",
            'cannot compile probe.cu: probe.cu(1): catastrophic error: could not open source file "cuda_bf16.h" '
            "(no directories in search list)",
        ),
        (
            'extern "C" __global__ void probe() { __shared__ volatile char x[300000]; x[threadIdx.x] = 1; }',
            "cannot compile probe.cu: ptxas error   : Entry function 'probe' uses too much shared data",
        ),
    ],
    ids=["define", "header", "ptxas"],
)
def test_first_complaint_is_the_message(nvrtc, folder, caplog, source, message):
    (folder / "probe.cu").write_text(source)
    with caplog.at_level(logging.DEBUG, "sagecompile"), pytest.raises(UnsupportedError) as caught:
        runtime.compile_cubin("probe.cu", ())
    assert str(caught.value).startswith(message) and "\n" not in str(caught.value)
    assert message.removeprefix("cannot compile probe.cu: ") in caplog.text


def test_nvrtc_is_found_in_pips_packages(nvrtc):
    """In a process where the plain name finds none: torch loaded none, and the system has none in its search path."""
    code = """
import ctypes
from sagecompile.kernels.hopper import runtime
plain = ctypes.CDLL
def only_paths(name, *rest, **named):
    if name.startswith("libnvrtc"): raise OSError("not in the search path")
    return plain(name, *rest, **named)
ctypes.CDLL = only_paths
print(runtime._nvrtc()._name, runtime._compile("k.cu", b"__global__ void k() {}", {}, list(runtime.OPTIONS))[1:4])
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    if "UnsupportedError" in done.stderr:
        pytest.skip("needs NVRTC from pip")
    assert done.returncode == 0, done.stderr
    path, magic = done.stdout.split()
    assert Path(path).is_absolute() and magic == "b'ELF'"


def test_torch_without_cuda_is_the_reason(monkeypatch):
    monkeypatch.setattr(torch.version, "cuda", None)
    with pytest.raises(UnsupportedError, match="is built without CUDA"):
        runtime._nvrtc.__wrapped__()


def test_missing_nvrtc_is_the_reason(monkeypatch):
    monkeypatch.setattr(torch.version, "cuda", "99.1")
    monkeypatch.setitem(sys.modules, "cuda.pathfinder", None)
    with pytest.raises(UnsupportedError, match=r"no libnvrtc\.so\.99: pip install .* of CUDA 99\.1"):
        runtime._nvrtc.__wrapped__()


# Launching, with a driver that only records.

RECORDER = r"""
#include <cuda.h>
#include <stddef.h>
#include <unistd.h>
const size_t layout[] = {
    sizeof(CUlaunchAttribute), offsetof(CUlaunchAttribute, value), sizeof(CUlaunchAttributeValue),
    sizeof(CUlaunchConfig), offsetof(CUlaunchConfig, sharedMemBytes), offsetof(CUlaunchConfig, hStream),
    offsetof(CUlaunchConfig, attrs), offsetof(CUlaunchConfig, numAttrs)};
int launches, mixed_up, retained, shared_set;
long last[9];
CUresult refusal = CUDA_SUCCESS;
static __thread CUcontext current;

CUresult cuInit(unsigned flags) { return CUDA_SUCCESS; }
CUresult cuGetErrorString(CUresult error, const char** text) { *text = "no such luck"; return CUDA_SUCCESS; }
CUresult cuCtxGetCurrent(CUcontext* context) { *context = current; return CUDA_SUCCESS; }
CUresult cuCtxSetCurrent(CUcontext context) { current = context; return CUDA_SUCCESS; }
CUresult cuDeviceGet(CUdevice* device, int ordinal) { *device = ordinal; return CUDA_SUCCESS; }
CUresult cuDevicePrimaryCtxRetain(CUcontext* context, CUdevice device) {
    *context = (CUcontext)&current;
    __sync_fetch_and_add(&retained, 1);
    return CUDA_SUCCESS;
}
CUresult cuModuleLoadData(CUmodule* module, const void* image) { *module = (CUmodule)image; return CUDA_SUCCESS; }
CUresult cuModuleGetFunction(CUfunction* function, CUmodule module, const char* name) {
    *function = (CUfunction)&launches;
    return name[0] == 'p' ? CUDA_SUCCESS : CUDA_ERROR_NOT_FOUND;
}
CUresult cuFuncSetAttribute(CUfunction function, CUfunction_attribute attribute, int value) {
    if (attribute == CU_FUNC_ATTRIBUTE_MAX_DYNAMIC_SHARED_SIZE_BYTES) shared_set = value;
    return CUDA_SUCCESS;
}
CUresult cuFuncGetAttribute(int* value, CUfunction_attribute attribute, CUfunction function) {
    *value = attribute == CU_FUNC_ATTRIBUTE_NUM_REGS ? 168 : attribute == CU_FUNC_ATTRIBUTE_LOCAL_SIZE_BYTES ? 16
             : attribute == CU_FUNC_ATTRIBUTE_SHARED_SIZE_BYTES ? 1024 : -1;
    return CUDA_SUCCESS;
}
CUresult cuLaunchKernelEx(const CUlaunchConfig* config, CUfunction function, void** parameters, void** extra) {
    struct { void* x; int count; }* given = parameters[0];
    unsigned wanted = given->count;
    if (given->x) usleep(100);  /* while other threads prepare their launches */
    if (config->gridDimX != wanted || (unsigned)given->count != wanted || !current) __sync_fetch_and_add(&mixed_up, 1);
    const CUlaunchAttribute* attribute = config->numAttrs ? config->attrs : NULL;
    const int overlaps = attribute && attribute->id == CU_LAUNCH_ATTRIBUTE_PROGRAMMATIC_STREAM_SERIALIZATION
        && attribute->value.programmaticStreamSerializationAllowed == 1;
    const long now[] = {
        config->gridDimX, config->gridDimY, config->gridDimZ, config->blockDimX, config->blockDimY * config->blockDimZ,
        config->sharedMemBytes, (long)config->hStream, config->numAttrs, overlaps};
    for (int i = 0; i < 9; i++) last[i] = now[i];
    __sync_fetch_and_add(&launches, 1);
    return refusal;
}
"""


@pytest.fixture(scope="module")
def recorder_library(tmp_path_factory) -> Path:
    folders = ["/usr/local/cuda/include", f"{sysconfig.get_path('purelib')}/triton/backends/nvidia/include"]
    include = next((folder for folder in folders if Path(folder, "cuda.h").exists()), None)
    if include is None:
        pytest.skip("needs cuda.h, of CUDA or of Triton")
    library = tmp_path_factory.mktemp("driver") / "recorder.so"
    library.with_suffix(".c").write_text(RECORDER)
    command = ["gcc", "-shared", "-fPIC", "-O1", f"-I{include}", library.with_suffix(".c"), "-o", library]
    try:
        subprocess.run(command, check=True)
    except FileNotFoundError:
        pytest.skip("needs gcc")
    return library


@pytest.fixture
def driver(recorder_library, tmp_path, monkeypatch):
    """A driver of its own for each test, in the place of NVIDIA's."""
    own = tmp_path / "libcuda.so.1"
    own.write_bytes(recorder_library.read_bytes())
    monkeypatch.setattr(runtime, "DRIVER", str(own))
    runtime._driver.cache_clear()
    yield runtime._driver()
    runtime._driver.cache_clear()


def number(driver, name: str) -> int:
    return ctypes.c_int.in_dll(driver, name).value


def last(driver) -> tuple[int, ...]:
    """gridDimX, Y, Z, threads (x, then y * z), dynamic shared bytes, stream, attributes, overlap."""
    return tuple((ctypes.c_long * 9).in_dll(driver, "last"))


def probe_source(entry: str = "probe", threads: int = 128, shared_bytes: int = 0) -> runtime.Source:
    return runtime.Source("probe.cu", entry, TWICE, threads, shared_bytes)


def recorded_kernel() -> runtime.Kernel:
    return runtime.Kernel(b"image", "probe", threads=384, shared_bytes=100_000, device=0)


def test_layout_of_the_launch_is_cudas(driver):
    attribute, config = runtime.LaunchAttribute, runtime.LaunchConfig
    assert tuple((ctypes.c_size_t * 8).in_dll(driver, "layout")) == (
        ctypes.sizeof(attribute),
        attribute.value.offset,
        ctypes.sizeof(attribute) - attribute.value.offset,
        ctypes.sizeof(config),
        config.sharedMemBytes.offset,
        config.hStream.offset,
        config.attrs.offset,
        config.numAttrs.offset,
    )


def test_what_is_launched(driver):
    kernel = recorded_kernel()
    kernel((7, 5, 3), Parameters(None, 7), 2**40)
    assert last(driver) == (7, 5, 3, 384, 1, 100_000, 2**40, 0, 0)
    kernel(132, Parameters(None, 132), 0, overlap=True)
    assert last(driver) == (132, 1, 1, 384, 1, 100_000, 0, 1, 1)
    kernel(1, Parameters(None, 1), 0)
    assert last(driver) == (1, 1, 1, 384, 1, 100_000, 0, 0, 0)
    assert number(driver, "launches") == 3 and number(driver, "mixed_up") == 0


def test_resources(driver):
    kernel = recorded_kernel()
    assert (kernel.registers, kernel.local_bytes, kernel.shared_bytes) == (168, 16, 101_024)
    assert number(driver, "shared_set") == 100_000


@pytest.mark.parametrize("grid", [0, (0, 1, 1), (1, 0, 1), (1, 1, 0)])
def test_no_blocks_is_no_launch(driver, grid):
    recorded_kernel()(grid, Parameters(), 0)
    assert number(driver, "launches") == 0


def test_refused_launch_says_what_and_why(driver):
    ctypes.c_int.in_dll(driver, "refusal").value = 701
    expected = (
        r"kernel probe on cuda:0, 384 threads, 100000 bytes of shared memory, grid \(9, 1, 1\): "
        r"no such luck \(CUDA error 701\)"
    )
    with pytest.raises(runtime.CudaError, match=expected) as caught:
        recorded_kernel()(9, Parameters(None, 9), 0)
    assert isinstance(caught.value, RuntimeError)


def test_refused_entry_says_which(driver):
    with pytest.raises(runtime.CudaError, match=r"kernel absent on cuda:0.*CUDA error 500"):
        runtime.Kernel(b"image", "absent", threads=32, shared_bytes=0, device=0)


def test_threads_do_not_mix_their_launches(driver):
    """8 threads at once, each new to CUDA, each with its own grid."""
    kernel, start = recorded_kernel(), threading.Barrier(8)

    def launch(count: int) -> None:
        start.wait()
        for _ in range(50):
            kernel(count, Parameters(1, count), 0)

    threads = [threading.Thread(target=launch, args=(count,)) for count in range(1, 9)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert number(driver, "launches") == 400 and number(driver, "mixed_up") == 0
    assert number(driver, "retained") == 9  # each of these threads, and this one


def test_kernel_is_loaded_once(driver, compiled):
    same = [runtime.kernel(probe_source(), device=0) for _ in "ab"]
    assert same[0] is same[1] and len(compiled) == 1


def test_what_was_begun_is_compiled_once_and_beside_others(driver, folder, monkeypatch):
    both = threading.Barrier(2)

    def compile(source, defines):
        both.wait(timeout=60)  # which only two at the same time get through
        return b"image"

    monkeypatch.setattr(runtime, "compile_cubin", compile)
    monkeypatch.setattr(runtime, "_version", lambda: (13, 0))
    first, second = probe_source(), probe_source()._replace(defines=(("FACTOR", 3),))
    assert runtime.begin(first) is runtime.begin(first) is not runtime.begin(second)
    assert runtime.kernel(first, device=0) is not runtime.kernel(second, device=0)


def test_what_could_not_be_compiled_is_tried_again(driver, compiled, folder):
    later = probe_source()._replace(file="later.cu")
    for _ in "ab":
        with pytest.raises(FileNotFoundError):
            runtime.kernel(later, device=0)
    (folder / "later.cu").write_text(PROBE)
    assert runtime.kernel(later, device=0) is runtime.kernel(later, device=0) and len(compiled) == 1


def test_missing_driver_is_the_reason(monkeypatch):
    monkeypatch.setattr(runtime, "DRIVER", "libcuda_that_is_not_there.so.1")
    with pytest.raises(UnsupportedError, match="no NVIDIA driver: libcuda_that_is_not_there"):
        runtime._driver.__wrapped__()


# A GPU.


@pytest.fixture
def probe(nvrtc) -> runtime.Kernel:
    """Doubles `count` numbers, 128 of them in a block; more shared memory than a kernel gets without asking."""
    if not torch.cuda.is_available() or torch.cuda.get_device_capability() != (9, 0):
        pytest.skip("needs a CUDA GPU of compute capability 9.0")
    torch.cuda.init()
    return runtime.kernel(probe_source(shared_bytes=100_000), device=0)


def double(kernel: runtime.Kernel, x: torch.Tensor, **options: bool) -> None:
    stream = torch.cuda.current_stream().cuda_stream
    kernel((x.numel() + 127) // 128, Parameters(x.data_ptr(), x.numel()), stream, **options)


@pytest.mark.gpu
@pytest.mark.parametrize("count", [1, 128, 1001, 100_000])
def test_result(probe, count):
    x = torch.arange(count, device="cuda", dtype=torch.float32)
    double(probe, x)
    assert torch.equal(x, 2 * torch.arange(count, device="cuda", dtype=torch.float32))


@pytest.mark.gpu
def test_resources_of_a_gpu(probe):
    assert 4 < probe.registers < 64 and probe.local_bytes == 0
    assert 100_000 <= probe.shared_bytes <= 100_000 + 1024  # what CUDA keeps for itself may be counted


@pytest.mark.gpu
@pytest.mark.parametrize("overlap", [False, True])
def test_side_stream(probe, overlap):
    x = torch.ones(100_000, device="cuda")
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        for _ in range(10):
            double(probe, x, overlap=overlap)
    side.synchronize()
    assert torch.equal(x, torch.full_like(x, 1024))


@pytest.mark.gpu
@pytest.mark.parametrize("overlap", [False, True])
def test_graph_capture(probe, overlap):
    x = torch.ones(100_000, device="cuda")
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        for _ in range(3):
            double(probe, x, overlap=overlap)
    assert x[0] == 1
    for _ in range(2):
        graph.replay()
    assert torch.equal(x, torch.full_like(x, 64))


@pytest.mark.gpu
def test_no_blocks_on_a_gpu(probe):
    double(probe, torch.empty(0, device="cuda"))
    torch.cuda.synchronize()


@pytest.mark.gpu
def test_a_thread_new_to_cuda(probe):
    x = torch.ones(1001, device="cuda")
    stream = torch.cuda.current_stream().cuda_stream
    thread = threading.Thread(target=lambda: probe(8, Parameters(x.data_ptr(), 1001), stream))
    thread.start()
    thread.join()
    assert torch.equal(x, torch.full_like(x, 2))


@pytest.mark.gpu
def test_wrong_entry_on_a_gpu(probe):
    with pytest.raises(runtime.CudaError, match=r"kernel absent on cuda:0.*not found"):
        runtime.kernel(probe_source("absent"), device=0)


@pytest.mark.gpu
def test_too_much_shared_memory_on_a_gpu(probe):
    with pytest.raises(runtime.CudaError, match="300000 bytes of shared memory: invalid argument"):
        runtime.kernel(probe_source(shared_bytes=300_000), device=0)


@pytest.mark.gpu
def test_too_many_threads_on_a_gpu(probe):
    wide = runtime.kernel(probe_source(threads=2048), device=0)
    with pytest.raises(runtime.CudaError, match=r"2048 threads.*grid \(8, 1, 1\): .*CUDA error"):
        double(wide, torch.ones(1001, device="cuda"))
