"""How kernels are generated and compiled: variants, LLVM IR, function pointers, the cache on disk."""
