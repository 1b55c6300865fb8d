"""Text becomes token files, and token files are read back as one corpus."""
