"""The world of the tiny teachers: pictures and videos of one coloured shape, prompts that describe them, and oracles that read them.

    a picture:  "a small red circle on a white background"
    a video:    "a small red circle moving left on a white background"

A prompt may leave any attribute out ("a red shape", "a red shape moving"), and the missing one is then *uniform* over its values. So what a
perfect model does with every prompt is known exactly, and prompt accuracy, mode coverage and spread are numbers, not opinions.

    python tiny/shapes.py --prompts prompts      # writes this project's prompt lists: three disjoint ones of each kind
"""
import argparse
import itertools
import os

import numpy as np

SIDE = 32  # pixels
FRAMES = 9  # of a video
ATTRIBUTES = {
    "size": ("small", "large"),
    "colour": ("red", "green", "blue", "yellow", "purple", "cyan"),
    "shape": ("circle", "square", "triangle"),
    "background": ("black", "grey", "white"),
}
VIDEO = ATTRIBUTES | {"motion": ("left", "right", "up", "down")}
STEPS = np.array([(-1.0, 0), (1, 0), (0, -1), (0, 1)])  # of a motion, (x, y) in pixels a frame
COLOURS = np.array([(220, 40, 40), (40, 170, 60), (50, 70, 230), (240, 215, 50), (165, 50, 200), (60, 205, 225)]) / 127.5 - 1
BACKGROUNDS = np.array([(20, 20, 20), (128, 128, 128), (238, 238, 238)]) / 127.5 - 1
RADII = (5.0, 8.0)  # pixels; of the circle. Squares and triangles have the circle's area, so area says nothing of the shape
CENTRES = (10.0, 22.0)  # each coordinate of the centre is uniform between these, in pixels; of a moving one, in every frame
DROP = 0.3  # probability that a prompt leaves an attribute out


def masks(shape, size, centre):
    """Antialiased coverage of n shapes: shape, size int [n], centre float [n, 2] as (x, y) -> [n, SIDE, SIDE] in [0, 1]."""
    grid = np.arange(SIDE) + 0.5
    x = grid[None, None, :] - centre[:, 0, None, None]
    y = grid[None, :, None] - centre[:, 1, None, None]
    radius = np.array(RADII)[size][:, None, None]
    half_side = radius * np.sqrt(np.pi) / 2
    inradius = radius * np.sqrt(np.pi / (3 * np.sqrt(3)))
    leaning = np.abs(x) * np.sqrt(3) / 2 - y / 2  # the two upper edges of a triangle that points up
    distances = (np.hypot(x, y) - radius, np.maximum(np.abs(x), np.abs(y)) - half_side, np.maximum(y, leaning) - inradius)
    distance = np.choose(np.asarray(shape)[:, None, None], distances)
    return np.clip(0.5 - distance, 0, 1)


def render(attributes, centre):
    """attributes {name: int [n]}, centre [n, 2] -> float32 pictures [n, 3, SIDE, SIDE] in [-1, 1]."""
    alpha = masks(attributes["shape"], attributes["size"], centre)[:, None]
    colour = COLOURS[attributes["colour"]][:, :, None, None]
    background = BACKGROUNDS[attributes["background"]][:, :, None, None]
    return (alpha * colour + (1 - alpha) * background).astype(np.float32)


def path(attributes, centre):
    """Centres of a video's frames [n, FRAMES, 2], from that of its middle frame [n, 2]."""
    return centre[:, None] + STEPS[attributes["motion"]][:, None] * (np.arange(FRAMES) - FRAMES // 2)[:, None]


def render_video(attributes, centre):
    """attributes {name: int [n]} with a motion, centre of the middle frame [n, 2] -> float32 videos [n, 3, FRAMES, SIDE, SIDE] in [-1, 1]."""
    frames = render({name: np.repeat(values, FRAMES) for name, values in attributes.items()}, path(attributes, centre).reshape(-1, 2))
    return frames.reshape(-1, FRAMES, 3, SIDE, SIDE).swapaxes(1, 2)


def draw(rng, n, world=ATTRIBUTES):
    """n random scenes: (attributes {name: int [n]}, centre [n, 2]), all uniform; `world` is ATTRIBUTES or VIDEO."""
    attributes = {name: rng.integers(len(values), size=n) for name, values in world.items()}
    travel = np.abs(STEPS[attributes["motion"]]) * (FRAMES // 2) if "motion" in world else 0
    return attributes, rng.uniform(CENTRES[0] + np.zeros((n, 2)) + travel, CENTRES[1] - travel)


def describe(attributes):
    """{name: value or None} of one picture or video -> its prompt; None leaves the attribute out."""
    words = ["a", attributes["size"], attributes["colour"], attributes["shape"] or "shape"]
    if "motion" in attributes:
        words += ["moving", attributes["motion"]]
    if attributes["background"]:
        words += ["on", "a", attributes["background"], "background"]
    return " ".join(word for word in words if word)


def parse(prompt):
    """Prompt -> {name: index or None}, the inverse of `describe`: a motion is among the names if the prompt says "moving".
    ValueError where the prompt is not of this world."""
    world = VIDEO if "moving" in prompt.split() else ATTRIBUTES
    known = {value: (name, i) for name, values in world.items() for i, value in enumerate(values)}
    attributes = dict.fromkeys(world)
    for word in prompt.split():
        if word in known:
            name, i = known[word]
            attributes[name] = i
        elif word not in ("a", "shape", "moving", "on", "background"):
            raise ValueError(f"the prompt {prompt!r} has the word {word!r}, which the world of shapes does not know")
    return attributes


def prompts_of(attributes, rng, drop=DROP):
    """attributes {name: int [n]} -> n prompts, each attribute left out with probability `drop`."""
    n = len(attributes["shape"])
    kept = {name: rng.random(n) >= drop for name in attributes}
    return [describe({name: VIDEO[name][values[i]] if kept[name][i] else None for name, values in attributes.items()}) for i in range(n)]


class Oracle:
    """Reads every attribute of a picture by matching it with clean templates. Plain arrays, no learning.

    A picture is *valid* if it really shows one shape: its background and colour are near known ones and the residual of
    the best template is small. The thresholds are far from both clean renders (0.01) and pictures of nothing (above 0.5)."""

    max_colour_error = 0.45  # Euclidean, RGB in [-1, 1]; the nearest two colours are 1.0 apart
    max_residual = 0.20  # squared error of the coverage over the template's own energy

    def __init__(self, spacing=0.5):
        axis = np.arange(CENTRES[0] - 2, CENTRES[1] + 2 + spacing, spacing)
        shape, size, x, y = (a.ravel() for a in np.meshgrid(range(3), range(2), axis, axis, indexing="ij"))
        self.shape, self.size, self.centre = shape, size, np.stack([x, y], 1)
        self.templates = masks(shape, size, self.centre).reshape(len(shape), -1).astype(np.float32)
        self.energy = (self.templates**2).sum(1)

    def read(self, pictures):
        """pictures [n, 3, SIDE, SIDE] in [-1, 1] -> {"size", "colour", "shape", "background": int [n], "x", "y": float [n] in
        pixels, "residual": float [n], "valid": bool [n]}. ValueError for pictures of another shape."""
        pictures = np.asarray(pictures, np.float32)
        if pictures.ndim != 4 or pictures.shape[1:] != (3, SIDE, SIDE):
            raise ValueError(f"the oracle reads pictures of shape [n, 3, {SIDE}, {SIDE}], not {list(pictures.shape)}")
        parts = [self._read(pictures[i : i + 512]) for i in range(0, len(pictures), 512)]
        return {key: np.concatenate([part[key] for part in parts]) for key in parts[0]}

    def _read(self, pictures):
        n = len(pictures)
        pixels = pictures.reshape(n, 3, -1)
        frame = np.ones((SIDE, SIDE), bool)
        frame[2:-2, 2:-2] = False
        background, background_error = nearest(np.median(pictures[:, :, frame], axis=2), BACKGROUNDS)
        ground = BACKGROUNDS[background][:, :, None]
        difference = np.linalg.norm(pixels - ground, axis=1)
        inside = np.argsort(-difference, axis=1)[:, :32]  # the small shape's interior has over 60 pixels
        colour, colour_error = nearest(np.median(np.take_along_axis(pixels, inside[:, None], 2), axis=2), COLOURS)
        direction = COLOURS[colour][:, :, None] - ground
        coverage = ((pixels - ground) * direction).sum(1) / (direction**2).sum(1)
        coverage = coverage.astype(np.float32)
        # |coverage - template|^2 for all templates at once; the term of the coverage alone does not change the best one
        mismatch = self.energy - 2 * coverage @ self.templates.T
        best = mismatch.argmin(1)
        residual = ((coverage**2).sum(1) + mismatch[np.arange(n), best]) / self.energy[best]
        valid = (background_error < self.max_colour_error) & (colour_error < self.max_colour_error) & (residual < self.max_residual)
        return {"size": self.size[best], "colour": colour, "shape": self.shape[best], "background": background,
                "x": self.centre[best, 0], "y": self.centre[best, 1], "residual": residual, "valid": valid}


class VideoOracle(Oracle):
    """Reads every frame of a video as a picture: attributes by majority, the motion off the line through the centres.

    A video is *valid* if all its frames but at most one are valid pictures of the same attributes and their centres move as a
    motion of this world does: near a straight line, along an axis, at its speed."""

    max_speed_error = 0.3  # pixels a frame, Euclidean, of the fitted velocity; standing still is 1 away
    max_scatter = 1.5  # pixels between a frame's centre and the line, each coordinate; all frames but at most one

    def read(self, videos):
        """videos [n, 3, FRAMES, SIDE, SIDE] in [-1, 1] -> as Oracle.read, and "motion": int [n]; "x", "y" are of the middle frame,
        "residual" is the mean over the frames. ValueError for videos of another shape."""
        videos = np.asarray(videos, np.float32)
        if videos.ndim != 5 or videos.shape[1:] != (3, FRAMES, SIDE, SIDE):
            raise ValueError(f"the oracle reads videos of shape [n, 3, {FRAMES}, {SIDE}, {SIDE}], not {list(videos.shape)}")
        frames = super().read(videos.swapaxes(1, 2).reshape(-1, 3, SIDE, SIDE))
        frames = {name: values.reshape(-1, FRAMES) for name, values in frames.items()}
        read = {name: (frames[name][..., None] == np.arange(len(values))).sum(1).argmax(1) for name, values in ATTRIBUTES.items()}
        good = frames["valid"] & np.all([frames[name] == read[name][:, None] for name in ATTRIBUTES], axis=0)
        time, centre = np.arange(FRAMES) - FRAMES // 2, np.stack([frames["x"], frames["y"]], 2)
        middle, velocity = centre.mean(1), (centre * time[:, None]).sum(1) / (time**2).sum()  # least squares
        read["motion"], speed_error = nearest(velocity, STEPS)
        good &= np.abs(centre - middle[:, None] - velocity[:, None] * time[:, None]).max(2) < self.max_scatter
        valid = (good.sum(1) >= FRAMES - 1) & (speed_error < self.max_speed_error)
        return read | {"x": middle[:, 0], "y": middle[:, 1], "residual": frames["residual"].mean(1), "valid": valid}


def nearest(points, known):
    """points [n, d], known [k, d] -> index of the nearest [n], its distance [n]."""
    distance = np.linalg.norm(points[:, None] - known, axis=2)
    return distance.argmin(1), distance.min(1)


def split_prompts(world=ATTRIBUTES, held_out=64, most=None, seed=0, evaluation_seed=65):
    """(train, tune, eval) prompt lists, disjoint. tune and eval are drawn as prompts come up in the world, eval from a seed with which it is
    fair (see tests/test_shapes.py): every attribute is left open by at least 3 prompts in 16, and no value is named over 1.6 times as often
    as another. train has all the others, or `most` of them."""
    rng = np.random.default_rng(seed)
    everything = sorted(describe(dict(zip(world, values))) for values in itertools.product(*((None, *values) for values in world.values())))

    def more(rng, known):
        drawn = []
        while len(drawn) < held_out:
            prompt = prompts_of(draw(rng, 1, world)[0], rng)[0]
            drawn += [prompt] if prompt not in known + drawn else []
        return drawn

    seen = more(rng, [])  # a list for evaluation once, seen while settings were still chosen: for training now
    tune = more(rng, seen)
    evaluation = more(np.random.default_rng(evaluation_seed), seen + tune)
    train = [p for p in everything if p not in tune + evaluation]
    if most:
        train = [train[i] for i in sorted(rng.choice(len(train), most, replace=False))]
    return train, tune, evaluation


def split_motion_prompts():
    """The same of videos: 320, 32 and 32 of the 1680 prompts."""
    return split_prompts(VIDEO, held_out=32, most=320, evaluation_seed=2878)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description="write the prompt lists of the world of shapes")
    parser.add_argument("--prompts", default="prompts", help="folder for {shapes,motion}_{train,tune,eval}.txt")
    folder = parser.parse_args().prompts
    os.makedirs(folder, exist_ok=True)
    for kind, lists in (("shapes", split_prompts()), ("motion", split_motion_prompts())):
        for name, prompts in zip(("train", "tune", "eval"), lists):
            with open(os.path.join(folder, f"{kind}_{name}.txt"), "w") as file:
                file.write("\n".join(prompts) + "\n")
