"""Runs that are resumed: their folders, locks, checksums and what several processes share."""
