"""A GPU and its driver: detection, pinning, copies, semaphores, memory budget."""
