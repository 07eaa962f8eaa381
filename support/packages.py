"""The packages that metrics want, and that may be missing."""

from support.errors import require

OPEN_CLIP = ("open_clip", "open_clip_torch", "computes the CLIP score and HPSv2")
LPIPS = ("lpips", "lpips", "computes the LPIPS diversity")
TORCHMETRICS = ("torchmetrics", "torchmetrics[image]", "computes FID")
INCEPTION = ("torch_fidelity", "torchmetrics[image]", "has FID's Inception")
OF_METRICS = {
    "clip": (OPEN_CLIP,),
    "hpsv2": (OPEN_CLIP,),
    "lpips": (LPIPS,),
    "fid": (TORCHMETRICS, INCEPTION),
}


def check_packages(metric):
    """UserError where a package of a metric is missing: said before a teacher is read."""
    for package in OF_METRICS.get(metric, ()):
        require(*package)
