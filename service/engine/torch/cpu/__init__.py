"""The prefill in C++ for CPUs with AMX or AVX-512 bf16: built by `build`, called through `kernel`."""
