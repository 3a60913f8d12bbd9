"""The artifact store: blobs, releases, tables."""
