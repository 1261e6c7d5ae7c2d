"""The CUDA kernel: its bits in Triton's interpreter, its code for GPUs that need not be there, its behaviour on one."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from fused_cases import DTYPES, F32, assert_same_bits, call, make_grads, make_lists

triton = pytest.importorskip("triton", reason='Triton is not installed: pip install "sharded-adopt[triton]"')

needs_gpu = pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")


def test_the_kernel_is_right_in_the_interpreter() -> None:
    # in a process of its own: Triton looks at the variable once, when it is imported
    done = subprocess.run(
        [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "interpreted_triton.py"],
        cwd=Path(__file__).parent,
        env={**os.environ, "TRITON_INTERPRET": "1"},
        capture_output=True,
        text=True,
        timeout=280,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    assert "skipped" not in done.stdout


@pytest.mark.parametrize("capability", [80, 90])
@pytest.mark.parametrize("dtypes", DTYPES, ids=str)
def test_the_kernel_compiles_for_a_gpu(dtypes: Any, capability: int) -> None:
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    from sharded_adopt.kernels import triton_kernel as kernel

    wide = torch.float64 in (dtypes[0], *dtypes[2:])
    constants = {
        "PARAM": kernel._TYPES[dtypes[0]],
        "GRAD": kernel._TYPES[dtypes[1]],
        "EXP_AVG": kernel._TYPES[dtypes[2]],
        "EXP_AVG_SQ": kernel._TYPES[dtypes[3]],
        "COMPUTE": kernel._TYPES[torch.float64 if wide else F32],
        "FLAGS": int(kernel._ALIGNED) + int(kernel._INIT_ELEMENT) + int(kernel._FOUND_INF),
        "CHUNK": kernel._CHUNK,
        "BLOCK": kernel._BLOCK,
    }
    signature = {
        **dict.fromkeys(("addresses", "chunks"), "*i64"),
        "steps": "*fp32",
        **dict.fromkeys(("bounds", "hyper"), "*fp64"),
        **dict.fromkeys(("lr_tensor", "grad_scale", "found_inf"), "*fp32"),
        **dict.fromkeys(constants, "constexpr"),
    }
    places = {name: (i,) for i, name in enumerate(signature)}
    source = ASTSource(kernel._update, signature, {places[name]: value for name, value in constants.items()})
    target = GPUTarget("cuda", capability, 32)
    compiled = triton.compile(source, target=target, options={"num_warps": kernel._WARPS, "enable_fp_fusion": False})
    ptx = compiled.asm["ptx"]
    assert compiled.asm["cubin"]
    vectors = sum(ptx.count(f".v{width}.b32") + ptx.count(f".v{width}.b64") for width in (2, 4))
    assert vectors, "whole blocks of aligned tensors must move 16 bytes at a time"
    # approximate division and contraction would leave the bits of the other kernels
    assert ".approx" not in ptx
    assert "div.full" not in ptx


def _on_gpu(lists: list[list[torch.Tensor]]) -> list[list[torch.Tensor]]:
    return [[tensor.cuda() for tensor in tensors] for tensors in lists]


@needs_gpu
@pytest.mark.parametrize("dtypes", DTYPES, ids=str)
def test_a_gpu_gives_the_bits_of_the_cpu(dtypes: Any) -> None:
    from sharded_adopt.kernels.fused import FusedAdopt

    generator = torch.Generator().manual_seed(0)
    cpu = make_lists([(5,), (3, 7), (100_003,)], dtypes, generator, steps=[0, 1, 7])
    gpu = _on_gpu(cpu)
    on_cpu, on_gpu = FusedAdopt(), FusedAdopt()
    for options in ({}, {"weight_decay": 0.1, "decouple": True, "nesterov": True}, {"init": "element"}):
        grads = make_grads(cpu[0], dtypes[1], generator)
        call(on_cpu, cpu, grads, **options)
        call(on_gpu, gpu, [grad.cuda() for grad in grads], **options)
    assert_same_bits([[tensor.cpu() for tensor in tensors] for tensors in gpu], cpu)


@needs_gpu
def test_a_step_on_a_gpu_reads_nothing_on_the_host() -> None:
    from sharded_adopt.kernels.fused import FusedAdopt

    generator = torch.Generator().manual_seed(1)
    lists = _on_gpu(make_lists([(5,), (100_003,)], DTYPES[0], generator))
    fused = FusedAdopt()
    found_inf = torch.zeros((), device="cuda")
    grads = [torch.ones_like(p) for p in lists[0]]
    call(fused, lists, grads, found_inf=found_inf)
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        call(fused, lists, grads, found_inf=found_inf)
    finally:
        torch.cuda.set_sync_debug_mode("default")


@needs_gpu
def test_a_step_can_be_captured_in_a_cuda_graph() -> None:
    from sharded_adopt import ADOPT

    results = []
    for captured in (False, True):
        generator = torch.Generator().manual_seed(2)
        params = [torch.nn.Parameter(torch.randn(n, generator=generator).cuda()) for n in (5, 1000, 70_000)]
        optimizer = ADOPT(params, capturable=True)
        for param in params:
            param.grad = torch.zeros_like(param)
        draws = [[torch.randn(p.shape, generator=generator).cuda() for p in params] for _ in range(6)]

        def feed(step: int, params: Any = params, draws: Any = draws) -> None:
            for param, draw in zip(params, draws[step], strict=True):
                param.grad.copy_(draw)

        graph = torch.cuda.CUDAGraph()
        side = torch.cuda.Stream()
        for step in range(3):
            side.wait_stream(torch.cuda.current_stream())
            with torch.cuda.stream(side):
                feed(step)
                optimizer.step()
            torch.cuda.current_stream().wait_stream(side)
        if captured:
            with torch.cuda.graph(graph):
                optimizer.step()
        for step in range(3, 6):
            feed(step)
            if captured:
                graph.replay()
            else:
                optimizer.step()
        results.append([*(param.detach().cpu() for param in params), *(optimizer.state[p]["step"] for p in params)])
    for eager, replayed in zip(*results, strict=True):
        assert torch.equal(eager.cpu(), replayed.cpu())
