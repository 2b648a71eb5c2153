"""Other attention kernels, timed beside the project's own: one file each."""
