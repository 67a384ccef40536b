"""The prefill in C++, for CPUs with AMX or AVX-512 bf16."""
