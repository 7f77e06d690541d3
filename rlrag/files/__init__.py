"""Files and directories on disk and in remote storage: written whole, locked, checked."""
