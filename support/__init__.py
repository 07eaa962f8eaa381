"""Plumbing that every stage uses and no paper describes: ranks, files, checkpoints, command lines."""
