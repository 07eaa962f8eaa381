"""Families of teachers beyond the paper's, a file each, imported when they are used."""
