"""Fits that are killed at random moments, and what must be true of the checkpoints that they leave behind."""
