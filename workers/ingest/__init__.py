"""Ingest: bundles of data with metadata, uploaded, checked and put into an archive, all of it or nothing."""
