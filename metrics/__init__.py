"""Scorers of images and videos, the images that systems draw, and the reports of their scores."""
