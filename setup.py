"""Compile the fused CPU kernel where there is a C compiler; everything else about the package is in pyproject.toml.

The extension is optional: where it cannot be compiled, the package installs without it and runs the foreach kernel. It
includes neither Python.h nor a torch header, so one file serves every Python, and torch need not be in the build.
"""

from setuptools import Extension, setup

NATIVE = "sharded_adopt/kernels/native"
HEADERS = ("convert.h", "isa.h", "lanes.h", "plan.h", "rule.h", "torch_api.h")

setup(
    ext_modules=[
        Extension(
            "sharded_adopt.kernels.native._adopt",
            sources=[f"{NATIVE}/adopt.c"],
            depends=[f"{NATIVE}/{header}" for header in HEADERS],
            # No contraction: a multiply-add is fused where the source says so and nowhere else.
            extra_compile_args=[
                "-std=c11",
                "-O3",
                "-ffp-contract=off",
                "-fno-math-errno",
                "-fno-trapping-math",
                "-fvisibility=hidden",
                "-g0",
            ],
            libraries=["m"],
            optional=True,
            py_limited_api=True,
        )
    ],
    options={"bdist_wheel": {"py_limited_api": "cp310"}},
)
