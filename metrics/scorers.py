"""The scorers by name, and which images each of them is for."""

from metrics.clip import Clip
from metrics.fid import Fid
from metrics.lpips import Lpips
from metrics.oracle import Oracle
from metrics.preference import Hpsv2, Mps, PickScore
from support.errors import UserError

SCORERS = {
    "oracle": Oracle,
    "clip": Clip,
    "pick": PickScore,
    "hpsv2": Hpsv2,
    "mps": Mps,
    "lpips": Lpips,
    "fid": Fid,
}


def check_metric(name, images, video):
    """UserError for a metric, one of SCORERS or vbench, that is not for these images (metrics.images.Images).
    video: whether the others of the table are videos."""
    kind = "images" if images.frames == 1 else "videos"
    takes = SCORERS[name].takes if name in SCORERS else ("videos",)
    if kind not in takes:
        raise UserError(f"the metric {name} is for {' and '.join(takes)}, not for {kind}")
    if name in SCORERS:
        SCORERS[name].check(images, video)
