"""What a GPU and its driver offer: detection, pinning, copies, semaphores, memory budget."""
