"""Files that are whole or absent: atomic folders with manifests and digests, and one writer at a time."""
