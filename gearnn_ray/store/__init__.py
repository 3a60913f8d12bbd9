"""The artifact store: files, blobs, manifests, releases and tables."""
