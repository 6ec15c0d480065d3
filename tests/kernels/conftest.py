"""Triton kernels run on CPU tensors here: the interpreter has to be chosen before a kernel is defined."""

import os

os.environ["TRITON_INTERPRET"] = "1"
