"""Modules and batches shaped like those of real projects, none of which knows of noise."""
