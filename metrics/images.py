"""The images of a system: drawn, scored and read, every rank its share."""

import hashlib
import itertools
import json
import os
import re
import time
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import torch
from tqdm import tqdm

from metrics.scores import read_scores, save_scores
from support.errors import UserError
from support.files import make_folder, remove_leftovers, write_sealed
from support.folders import check_index
from support.images import measure_image, open_image
from support.media import save_grid, save_video
from support.parallel import is_main, rank, world_size
from support.tensors import sample_bits

# Images that are scored at a time: a constant, so that scores do not depend on the number of ranks
CHUNK = 64
WRITERS = 4  # threads: a PNG of a megapixel takes longer to write than a student of one step to draw


class Images:
    """A system's images: files[p][k] is sample k of prompt p. A video's frames are below one another in it.

    `system` draws them; None where they were found. `index` says what they are of, and is kept with them.
    `sizes`: all (width, height) that they have, of found ones after measure()."""

    def __init__(self, name, folder, files, index, system=None):
        self.name = name
        self.folder = folder
        self.files = files
        self.index = index
        self.system = system
        self.frames = 1
        self.fps = None
        self.sizes = set()
        if system:
            self.frames = system.teacher.frames or 1
            self.fps = system.teacher.fps
            height, width = system.teacher.resolution
            self.sizes.add((width, height * self.frames))

    def check(self):
        """UserError where the folder has another system's images or scores, the same with other settings, or
        some of which nothing says what they are of."""
        parts = [os.path.join(self.folder, part) for part in ("pictures", "scores")]
        has_results = any(os.path.isdir(part) and os.listdir(part) for part in parts)
        check_index(self.folder, self.index, has_results)

    def measure(self):
        """Notes the sizes of found images. UserError for one that open_image refuses by its header."""
        if not self.system:
            self.sizes = {measure_image(path) for row in self.files for path in row}

    def count(self):
        """How many images there are."""
        return len(self.files) * len(self.files[0])

    def prepare_folder(self):
        """Makes the folder with its index. The other ranks wait for that: no result is there before what says
        what it is of."""
        path = os.path.join(self.folder, "index.json")
        make_folder(os.path.join(self.folder, "pictures") if self.system else self.folder)
        if is_main():
            for place, _, _ in os.walk(self.folder):
                remove_leftovers(place)
            write_sealed(path, self.index)
        wait_for_files([path])
        self.check()  # the main rank may have found another checkpoint of a run that goes on

    def draw(self, prompts, seeds, batch):
        """Draws what is missing of this rank's share -> mean seconds an image; None where nothing was."""
        if not self.system:
            return None
        batches = list(itertools.product(range(0, len(prompts), batch), range(len(seeds))))
        share = batches[rank() :: world_size()]
        left = [part for part in share if not self.has_drawn(*part, batch)]
        if not left:
            return None
        seconds, writing = [], []
        with self.system.on_device(), ThreadPoolExecutor(WRITERS) as pool:
            for first, k in tqdm(left, desc=self.name, unit="batch", disable=not is_main()):
                numbers = range(first, min(first + batch, len(prompts)))
                start = time.perf_counter()
                pixels = self.system.images([prompts[i] for i in numbers], numbers, [seeds[k]])[:, 0]
                seconds.append((time.perf_counter() - start) / len(numbers))
                wait_for(writing)  # the last batch's
                writing = []
                for i, image in zip(numbers, pixels):
                    rows = image.flatten(1, -2)  # [3, (F x) H, W]
                    writing.append(pool.submit(save_grid, rows[None], self.files[i][k], padding=0))
            wait_for(writing)
        return np.mean(seconds)

    def has_drawn(self, first, k, batch):
        return all(os.path.exists(row[k]) for row in self.files[first : first + batch])

    def score(self, metric, scorer, prompts, workers):
        """Scores what has no scores of this rank's share, or damaged ones -> the paths of all ranks' scores,
        in order."""
        chunk = max(1, CHUNK // len(self.files[0]))
        digest = hashlib.sha256(json.dumps([scorer.description, chunk]).encode())
        digest.update(sample_bits(scorer.list_weights()))
        folder = os.path.join(self.folder, "scores", f"{metric}-{digest.hexdigest()[:8]}")
        make_folder(folder)
        firsts = range(0, len(prompts), chunk)
        paths = [os.path.join(folder, f"{first:06d}.safetensors") for first in firsts]
        share = list(zip(firsts, paths))[rank() :: world_size()]
        left = [(first, path) for first, path in share if read_scores(path) is None]

        chunks = [self.files[first : first + chunk] for first, _ in left]
        loader = load_chunks(chunks, scorer.prepare, workers)
        bar = tqdm(left, desc=f"{self.name}, {metric}", unit="batch", disable=not is_main())
        for (first, path), prepared in zip(bar, loader):
            if isinstance(prepared, UserError):
                raise prepared
            save_scores(scorer.score(prepared, prompts[first : first + chunk]), path)
        return paths

    def read_frames(self, p, k=0):
        """Sample k of prompt p as PIL images: one, or a video's frames."""
        image = open_image(self.files[p][k])
        height = image.height // self.frames
        tops = [i * height for i in range(self.frames)]
        return [image.crop((0, top, image.width, top + height)) for top in tops]

    def read_pixels(self, p, k=0, size=None):
        """The same as [3, (F,) H, W] in [-1, 1], resized to `size` (width, height)."""
        frames = [frame.resize(size or frame.size) for frame in self.read_frames(p, k)]
        pixels = torch.from_numpy(np.stack([np.array(frame) for frame in frames]))
        pixels = pixels.permute(3, 0, 1, 2) / 127.5 - 1
        return pixels if self.frames > 1 else pixels[:, 0]

    def write_videos(self):
        """Every sample as an mp4 file beside its image -> paths [P][K]."""
        paths = []
        for p, row in enumerate(self.files):
            paths.append([re.sub("png$", "mp4", file) for file in row])
            for k, path in enumerate(paths[p]):
                if not os.path.exists(path):
                    save_video(self.read_pixels(p, k), path, self.fps)
        return paths


def wait_for(jobs):
    """Raises what one of these futures has raised."""
    for job in jobs:
        job.result()


class Prepared(torch.utils.data.Dataset):
    """Files [P][K] of each chunk -> what a scorer wants, [P, K, ...]; a UserError where an image cannot be
    read, returned: what a worker process raises comes with its traceback."""

    def __init__(self, chunks, prepare):
        self.chunks = chunks
        self.prepare = prepare

    def __len__(self):
        return len(self.chunks)

    def __getitem__(self, i):
        prompts = []
        try:
            for row in self.chunks[i]:
                prompts.append(torch.stack([self.prepare(open_image(path)) for path in row]))
        except UserError as error:
            return error
        return torch.stack(prompts)


def load_chunks(chunks, prepare, workers):
    """An iterable over prepared chunks; worker processes decode them while others are scored."""
    workers = min(workers, len(chunks))
    return torch.utils.data.DataLoader(
        Prepared(chunks, prepare),
        batch_size=None,
        num_workers=workers,
        multiprocessing_context="fork" if workers else None,
    )


def wait_for_files(paths):
    """Returns when the other ranks, too, have written their files. They share nothing else: no group, no
    timeout; torchrun ends all of them when one fails."""
    for path in paths:
        while not os.path.exists(path):
            time.sleep(0.2)


def wait_for_scores(paths):
    """The same for files of scores -> what is in each: a damaged one will be written again."""
    scores = []
    for path in paths:
        while (columns := read_scores(path)) is None:
            time.sleep(0.2)
        scores.append(columns)
    return scores
