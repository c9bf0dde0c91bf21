// The ops of the namespace `qkernels`, defined for whoever loads the library: Python, or a program without it.

#include <torch/csrc/stable/library.h>

STABLE_TORCH_LIBRARY(qkernels, m) {
#include "schemas.inc"  // m.def("..."); for each op of qkernels/ops/schemas.py, written by setup.py
}
