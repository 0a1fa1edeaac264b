"""Compile every Triton kernel of the library for a GPU that need not be here: `python tests/compile_kernels.py 90`.

Run by test_kernel_compilation.py in a process of its own, since Triton decides when it is imported whether to interpret.
Prints one line a kernel: name, registers, bytes of stack.
"""

import re
import subprocess
import sys
import tempfile
from pathlib import Path

import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from vargen.kernels import device, draw, language, nearest, warp
from vargen.kernels.tree import lantern
from vargen.kernels.tree import triton_kernels as tree_kernels
from vargen.kernels.verify import group, label, shift
from vargen.kernels.verify import triton_kernels as verify_kernels

POINTERS = {
    "*u8": "accepted",
    "*i8": "kind kind_out",
    "*i16": "table",
    "*i64": "tokens row seeds positions iteration num_rows forced errors committed codes token_out row_out nearest "
    "children row_of limit path num_accepted num_uniforms num_relaxed",
}
FLOATS = ["scale", "inv_t", "top_p", "constant", "factor", "uniform_prob", "prob_threshold", "distance_threshold"]
GROUPS = {
    "logits": device.Logits("*bf16", "i64", "i64", "i64"),
    "warp": device.Warp("*fp32", "fp32", "fp32", "fp32", "i32"),
    "drafts": label.Drafts,
    "places": verify_kernels.Places,
    "given": verify_kernels.Given,
    "outcomes": verify_kernels.Outcomes,
    "group": group.Groups("*fp32", "i32", "fp32", "fp32"),
    "nodes": tree_kernels.Nodes("*i64", "i32", "*i64", "i32", "i32", "*fp32", "i32", "*i64"),
    "slots": tree_kernels.Slots("*fp32", "i32", "*i64", "*i64", "*i64"),
    "neighbors": lantern.Neighbors("*i16", "fp32", "fp32"),
    "found": tree_kernels.Path,
}
NUM_CODES = 16384
ROWS = {"GUIDED": True, "PER_IMAGE": True}
SEARCH = {"SPARSE": True, "NUCLEUS": True}
WINDOW = {"LABEL_GUIDED": True, "FORCED": True, "GIVEN": False}
GROUP = {"HALF": 7, "CLOSE": True, "DIM": 16}


def kernels():
    """(kernel, compile-time arguments) in the variants that use the most."""
    rows = {**ROWS, **SEARCH, **WINDOW, "GREEDY": False}
    yield warp._warp_kernel, {**ROWS, **SEARCH}
    yield draw._draw_kernel, {**ROWS, **SEARCH, "GREEDY": False, "STEPPED": True, "GIVEN": False}
    yield verify_kernels.stats_kernel, {**ROWS, **SEARCH}
    for carry in (0, 1, 2):
        yield verify_kernels.rows_kernel, {**rows, "CARRY": carry, "HALF": 0, "CLOSE": False, "DIM": 16}
    yield verify_kernels.rows_kernel, {**rows, "CARRY": 2, **GROUP}
    yield verify_kernels.finish_kernel, {**ROWS, **WINDOW, "WINDOW": 32, "CARRY": 2}
    tree = {**ROWS, **SEARCH, "FORCED": True, "SAMPLED": True, "REPLACEMENT": False, "RELAXED": True}
    for rule in (0, 1, 2):
        yield tree_kernels.tree_kernel, {**tree, "COUNT": 10, "REACH": 1024, "RULE": rule}
    yield shift._shift_kernel, {"LEFT": False, "ABOVE": True, "FORCED": True, "WINDOW": 32}
    yield nearest._nearest_kernel, {"ROWS": 64, "CODES": 64, "CHANNELS": 32, "V": NUM_CODES, "C": 256}


def type_of(name):
    """Type of a run-time argument, by its name."""
    if name in GROUPS:
        members = GROUPS[name]
        return members if isinstance(members, tuple) else members(*(type_of(f"{m}_ptr") for m in members._fields))
    stem = name.removesuffix("_ptr")
    if stem == "logits":  # those of the labels, inside a group
        return GROUPS["logits"]
    for kind, names in POINTERS.items():
        if stem in names.split() and (name.endswith("_ptr") or name.endswith("_out")):
            return kind
    if name.endswith(("_ptr", "_out")):
        return "*fp32"
    return "fp32" if name in FLOATS else "i32"


def compiled(kernel, constants, capability):
    """Machine code of a kernel."""
    options = language.launch_options(NUM_CODES)
    tiling = {name: options[name] for name in ("BLOCK", "TILES", "PIECE", "PIECES") if name in kernel.arg_names}
    constants = {**constants, **tiling}
    signature = {name: "constexpr" if name in constants else type_of(name) for name in kernel.arg_names}
    places = {(kernel.arg_names.index(name),): value for name, value in constants.items()}
    source = ASTSource(fn=kernel, signature=signature, constexprs=places)
    warps = {"_shift_kernel": 1, "_nearest_kernel": 8}.get(kernel.__name__, options["num_warps"])
    fused = {"enable_fp_fusion": kernel is nearest._nearest_kernel}
    return triton.compile(source, target=GPUTarget("cuda", capability, 32), options={"num_warps": warps, **fused})


def usage(code):
    """(registers, bytes of stack) of a compiled kernel."""
    tool = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "cuobjdump"
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(code)
        file.flush()
        text = subprocess.run([tool, "-res-usage", file.name], capture_output=True, text=True, check=False).stdout
    found = re.search(r"REG:(\d+).*?STACK:(\d+)", text)
    return (int(found[1]), int(found[2])) if found else (-1, -1)


def main():
    for kernel, constants in kernels():
        registers, stack = usage(compiled(kernel, constants, int(sys.argv[1])).asm["cubin"])
        sys.stdout.write(f"{kernel.__name__} {registers} {stack}\n")
        sys.stdout.flush()


if __name__ == "__main__":
    main()
