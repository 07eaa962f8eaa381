"""FID, the Fréchet distance to the images of a reference."""

import numpy as np
import torch

from metrics.scorer import Scorer, cut_square
from metrics.weights import read_weights, report_mismatch
from support.errors import UserError
from support.files import fetch
from support.packages import check_packages
from support.parallel import own_device

FEATURES = 2048  # of Inception


class Fid(Scorer):
    """Fréchet distance in features of the Inception of 2015 (torchmetrics), of images that Pillow resizes."""

    URL = (
        "https://github.com/toshas/torch-fidelity/releases/download/v0.2.0/"
        "weights-inception-2015-12-05-6726825d.pth"
    )
    description = "Inception of 2015, the middle square of each image"

    def __init__(self, args, prompts, video):
        check_packages("fid")
        from torchmetrics.image.fid import NoTrainInceptionV3

        self.device = own_device()
        path = fetch(self.URL, "give --weights-dir DIR with it", args.weights_dir)
        read_weights(path)  # the library unpickles it: only after it has been read as tensors alone
        try:
            self.model = NoTrainInceptionV3("inception-v3-compat", [str(FEATURES)], path).to(self.device)
        except RuntimeError as error:
            raise report_mismatch(path, error) from error

    @classmethod
    def check(cls, images, video):
        if images.count() < 2:
            raise UserError(f"--metrics fid wants more than one image; {images.name} has one")

    def prepare(self, image):
        from PIL import Image

        resized = cut_square(image).resize((299, 299), Image.Resampling.BICUBIC)
        return torch.from_numpy(np.array(resized)).permute(2, 0, 1)

    @torch.no_grad()
    def score(self, images, prompts):
        features = self.model(images.flatten(0, 1).to(self.device))
        return {"features": features.cpu().numpy()}

    def result(self, scores, reference):
        if scores is reference:
            return {"fid": None}
        from torchmetrics.image.fid import FrechetInceptionDistance

        identity = torch.nn.Identity()  # what torchmetrics gets are features already
        identity.num_features = scores[0]["features"].shape[1]
        distance = FrechetInceptionDistance(identity)
        for part in scores:
            distance.update(torch.from_numpy(part["features"]), real=False)
        for part in reference:
            distance.update(torch.from_numpy(part["features"]), real=True)
        counts = distance.fake_features_num_samples.item(), distance.real_features_num_samples.item()
        return {"fid": distance.compute().item(), "fid_images": counts}

    def note(self, rows):
        note = ""
        compared = [row for row in rows if "fid_images" in row]
        for row in compared:
            own, reference = row["fid_images"]
            note += f"; {row['system']} of {own:,} and {reference:,} images"
        if any(min(row["fid_images"]) < FEATURES for row in compared):
            note += (
                f"; fewer than {FEATURES:,} images do not fill the covariance of as many features: compare "
                "with FIDs of as many images alone"
            )
        return note
