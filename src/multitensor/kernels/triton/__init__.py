"""Kernels in Triton for GPUs that NVRTC knows nothing of, AMD's and Intel's, over the same resident planes.

Only kernels/dispatch.py imports this package, and only for such a device: Triton needs a C compiler at run time. None
of these kernels has run on a GPU yet, of any vendor. What is tested is their arithmetic, in Triton's interpreter on a
CPU, and that Triton compiles them for AMD's and NVIDIA's GPUs; for Intel's not even that. So every use is tried on the
user's own device before it is relied on (trials.py).
"""
