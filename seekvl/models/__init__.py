"""The networks: one file each, single device, no files, no strings."""
