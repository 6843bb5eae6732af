"""C++ and CUDA kernels of the extension."""
