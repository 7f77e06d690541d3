"""Atomic writes, locks and checksums of files and directories, local and remote."""
